"""Multi-scale deformable attention that is fast everywhere. One door:
`pallas_kernels.deformable_attention`; imports jax and nothing of ours.
"""
