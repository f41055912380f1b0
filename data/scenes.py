from data.config import DataConfig
def read_scenes(config: DataConfig, split: str): raise NotImplementedError
