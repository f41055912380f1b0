"""An archive of images through Spark: a model for each partition, a row of Parquet for each
image.

    pip install pyspark pandas pyarrow         # and Java
    python examples/predict_with_spark.py photos/ --checkpoint=runs/demo --output=found

`dsct predict-many` does the same without Spark, and goes on where it was stopped.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from pyspark.sql import SparkSession


def main() -> None:
    """Predicts every .jpg and .png below the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    paths = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".png"))
    checkpoint, output = (str(Path(p).resolve()) for p in (arguments.checkpoint, arguments.output))

    def predict(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import dsct_jax

        model = dsct_jax.load(checkpoint)
        for batch in batches:
            answers = dsct_jax.predict(model, batch["path"].tolist())
            people = [json.dumps([dataclasses.asdict(one) for one in found]) for found in answers]
            yield pd.DataFrame({"path": batch["path"], "people": people})

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # of the workers: this one
    master = f"local[{arguments.workers}]"
    spark = SparkSession.builder.master(master).appName("dsct").getOrCreate()
    rows = spark.createDataFrame([(path,) for path in paths], "path string")
    rows = rows.repartition(arguments.workers)
    rows.mapInPandas(predict, "path string, people string").write.parquet(output)
    spark.stop()


if __name__ == "__main__":
    main()
