#!/bin/sh
# Everything that only a GPU can show, in the order of worth: are the kernels right, which tiles,
# how fast are kernel, forward pass and training step. Tables go to the directory in $1.
#
#     sh benchmarks/on_gpu.sh benchmarks/gpu
#
# About ten minutes on an H100, most of it compiling. STEPS chooses, e.g. STEPS="tests tiles".
out=${1:?the directory for tables}
mkdir -p "$out"
STEPS=${STEPS:-tests tiles kernels forward step profile golden}
export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}"
wanted() { case " $STEPS " in *" $1 "*) echo "== $1, $(date +%T)" ;; *) false ;; esac; }

if wanted tests; then
	python3 -m pytest -q -p no:benchmark -m gpu -n 8 --dist load \
		tests/pallas_kernels/test_pallas_gpu.py
fi
if wanted tiles; then
	timeout 200 python3 -m benchmarks.tune_tiles --output "$out/tiles"
fi
if wanted kernels; then
	timeout 150 python3 -m pallas_kernels.bench --torch --dtype float32 bfloat16 \
		--workloads encoder_800x1066 decoder_304 --output "$out/deformable_attention"
fi
if wanted forward; then
	timeout 200 python3 -m benchmarks.forward --output "$out/forward"
fi
if wanted step; then
	timeout 300 python3 -m benchmarks.training_step --sizes 800x1066 --batches 8 \
		--dtypes bfloat16 float32 --remat none --output "$out/training_step"
fi
if wanted profile; then
	# a recorded graph of launches is one event: without graphs, each kernel has its name
	XLA_FLAGS="$XLA_FLAGS --xla_gpu_enable_command_buffer=" timeout 150 \
		python3 -m benchmarks.profile_step --size 800x1066 --batch 8 --dtype bfloat16 --remat none \
		--output "$out/profile_step"
fi
if wanted golden; then
	# float32 products in full, not in the tensor cores' 10 bits
	JAX_DEFAULT_MATMUL_PRECISION=highest timeout 200 python3 -m pytest -q -p no:benchmark -n 8 \
		--dist load -k golden tests/model tests/training
fi
