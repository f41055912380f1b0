"""The layers that differ from Flax's: PyTorch's epsilons, paddings and initial values, and forms
that are fast on the CPU.

Parameters are float32; every layer computes in the type of its input (`model.compute_dtype`) and
returns it. Norms and `linear_in_float32` measure and sum in float32 whatever the input.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Bool, Float, Key

from dsct_jax.boxes import AnyArray
from dsct_jax.errors import UserError

NORM_EPSILON = 1e-5  # PyTorch's; Flax's 1e-6 moves the logits by 4e-5

REMAT = ("none", "light", "layers", "all")
SAVED = "kept"  # name of what `rematerialized` layers never compute twice
MATMUL = "product"  # name of the result of a dense layer or a 1x1 convolution

Initializer = Callable[..., jax.Array]


def initializer(draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]) -> Initializer:
    """An initializer that draws with NumPy: a seed gives the same weights on every backend."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        if isinstance(key, jax.core.Tracer):  # shapes only (nnx.eval_shape)
            return jnp.zeros(shape, dtype)
        generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return jnp.asarray(draw(generator, shape), dtype)

    return init


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    area = math.prod(shape[:-2])
    return shape[-2] * area, shape[-1] * area


def _xavier(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    bound = math.sqrt(6 / sum(_fans(shape)))
    return generator.uniform(-bound, bound, shape)


def _he(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.normal(0, math.sqrt(2 / _fans(shape)[1]), shape)


xavier_uniform = initializer(_xavier)
he_normal_fan_out = initializer(_he)  # torchvision's ResNet
standard_normal = initializer(lambda g, shape: g.standard_normal(shape))


def torch_uniform(fan_in: int) -> Initializer:
    """PyTorch's default for a Linear layer, weight and bias alike: uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return initializer(lambda g, shape: g.uniform(-bound, bound, shape))


def matmul_2d(
    x: Float[Array, "*n a"], kernel: Float[Array | np.ndarray, "*one a b"], dtype: Any
) -> Float[Array, "*n b"]:
    """x @ kernel in `dtype`, as one product of two matrices whatever the leading axes (those of the
    kernel are ones), there and back.

    With several leading axes XLA's CPU backend transposes what comes back, element by element: up
    to half of a layer's backward pass. Written out, the gradients keep `x` and `kernel` as given.
    """
    return checkpoint_name(_matmul_2d(x, kernel, dtype), MATMUL)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul_2d(x: Any, kernel: Any, dtype: Any) -> jax.Array:
    product = jnp.matmul(_rows(x), _rows(kernel), preferred_element_type=dtype)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def _rows(x: Any) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _product_backward(
    dtype: Any, kept: tuple[Any, Any], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    g_x = jnp.matmul(_rows(g), _rows(kernel).T, preferred_element_type=dtype)
    g_kernel = jnp.matmul(_rows(x).T, _rows(g), preferred_element_type=dtype)
    return g_x.astype(x.dtype).reshape(x.shape), g_kernel.astype(kernel.dtype).reshape(kernel.shape)


_matmul_2d.defvjp(
    lambda x, kernel, dtype: (_matmul_2d(x, kernel, dtype), (x, kernel)), _product_backward
)


class Linear(nnx.Linear):
    """A dense layer in the type of its input; the defaults are those of the transformer."""

    def __init__(
        self, d_in, d_out, *, kernel_init=xavier_uniform, bias_init=nnx.initializers.zeros, rngs
    ):
        super().__init__(d_in, d_out, kernel_init=kernel_init, bias_init=bias_init, rngs=rngs)

    def __call__(
        self, inputs: Float[Array, "*n a"], out_sharding: Any = None
    ) -> Float[Array, "*n b"]:
        assert self.bias is not None and out_sharding is None
        y = matmul_2d(inputs, self.kernel[...].astype(inputs.dtype), inputs.dtype)
        return y + _as_row(self.bias[...].astype(inputs.dtype), y.ndim)


class MLP(nnx.List):
    """Dense layers from width to width with a ReLU between them; biases start as PyTorch's unless
    told otherwise, and the kernels too unless `xavier`.
    """

    def __init__(
        self,
        *widths: int,
        xavier: bool = True,
        bias_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        layers = []
        for a, b in itertools.pairwise(widths):
            start = torch_uniform(a)
            kernel_init = xavier_uniform if xavier else start
            biases = bias_init or start
            layers.append(Linear(a, b, kernel_init=kernel_init, bias_init=biases, rngs=rngs))
        super().__init__(layers)

    def __call__(self, x: Float[Array, "*n a"]) -> Float[Array, "*n b"]:
        for layer in list(self)[:-1]:
            x = jax.nn.relu(layer(x))
        return self[-1](x)


def _as_row(values: Float[AnyArray, " d"], ndim: int) -> Float[AnyArray, "*one d"]:
    return values.reshape(*(1,) * (ndim - 1), -1)


def linear_in_float32(layer: Linear, x: Float[Array, "*n a"]) -> Float[Array, "*n b"]:
    """The layer's result for an input of any type, summed and returned in float32."""
    assert layer.bias is not None
    y = matmul_2d(x, layer.kernel[...].astype(x.dtype), jnp.float32)
    return y + _as_row(layer.bias[...], y.ndim)


@jax.custom_vjp
def scale_and_shift(
    x: Float[Array, "*n d"], scale: Float[Array, " d"], bias: Float[Array, " d"]
) -> Float[Array, "*n d"]:
    """x * scale + bias, with gradients in an order that XLA's CPU backend vectorizes: what JAX
    derives takes three times as long in a norm's backward pass.
    """
    return x * _as_row(scale, x.ndim) + _as_row(bias, x.ndim)


def _scale_and_shift_backward(
    kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale = kept
    axes = tuple(range(g.ndim - 1))
    return g * _as_row(scale, g.ndim), (g * x).sum(axes), g.sum(axes)


scale_and_shift.defvjp(
    lambda x, scale, bias: (scale_and_shift(x, scale, bias), (x, scale)), _scale_and_shift_backward
)


class LayerNorm(nnx.LayerNorm):
    """Layer normalization in float32, returned in the type of its input."""

    def __init__(self, d: int, *, rngs: nnx.Rngs):
        super().__init__(d, epsilon=NORM_EPSILON, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*n d"], *, mask: jax.Array | None = None
    ) -> Float[Array, "*n d"]:
        assert self.scale is not None and self.bias is not None and mask is None
        exact = x.astype(jnp.float32)
        centered = exact - exact.mean(-1, keepdims=True)
        variance = jnp.square(centered).mean(-1, keepdims=True)
        unit = centered * jax.lax.rsqrt(variance + self.epsilon)
        return scale_and_shift(unit, self.scale[...], self.bias[...]).astype(x.dtype)


def rematerialized(layer: Callable[..., Any], rule: str) -> Callable[..., Any]:
    """The layer, of whose inside the backward pass keeps (none) everything, (light) the results of
    matrix products, sampled attention and dropout's bits, or (layers, all) the last two only.
    """
    if rule == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(SAVED)
    if rule == "light":
        named = policies.save_only_these_names(SAVED, MATMUL)
        policy = policies.save_from_both_policies(named, policies.dots_saveable)
    return jax.checkpoint(layer, policy=policy)


class DropoutNoise:
    """The random bits of a training step: one key per image, however a batch is spread."""

    def __init__(self, keys: Key[Array, " b"]):
        self._keys, self._calls = keys, 0

    def keep(self, shape: tuple[int, ...], rate: float) -> Bool[Array, " b *n"]:
        """Fresh mask of `shape` (b, ...), False with probability `rate` (to 1/65536)."""
        self._calls += 1
        size = math.prod(shape[1:])

        def keep_image(key: Key[Array, ""]) -> Bool[Array, "..."]:
            # Four entries per hash: jax.random.bits, one hash per entry, is twelve times slower on
            # the CPU. Compared before they are joined: one byte per entry.
            data = jax.random.key_data(jax.random.fold_in(key, self._calls))
            words = threefry_2x32(data, jnp.arange(-(-size // 2), dtype=jnp.uint32))
            first = round(rate * 65536)  # of the values that are kept
            kept = jnp.concatenate([(words & 0xFFFF) >= first, (words >> 16) >= first])
            return kept[:size].reshape(shape[1:])

        return checkpoint_name(jax.vmap(keep_image)(self._keys), SAVED)

    def uniform(self, shape: tuple[int, ...]) -> Float[Array, " b *n"]:
        """Fresh numbers in [0, 1) of `shape` (b, ...)."""
        self._calls += 1
        keys = jax.vmap(jax.random.fold_in, (0, None))(self._keys, self._calls)
        return jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))(keys)


def dropout(
    x: Float[Array, " b *n"], rate: float, noise: DropoutNoise | None
) -> Float[Array, " b *n"]:
    """Dropout of each image with its own key; without `noise` or at rate 0 the identity."""
    if noise is None or rate == 0:
        return x
    return jnp.where(noise.keep(x.shape, rate), x / (1 - rate), 0)


class Conv(nnx.Module):
    """2-D convolution, NHWC, padding k // 2 (x dilation) on every side (PyTorch's, not 'SAME').

    A 1x1 kernel is a matrix product: 1.5 to 4 times faster on the CPU and the same elsewhere.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        use_bias: bool = False,
        kernel_init=he_normal_fan_out,
        bias_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        self.size, self.stride, self.dilation = size, stride, dilation
        self.kernel = nnx.Param(kernel_init(rngs.params(), (size, size, d_in, d_out), jnp.float32))
        # without an initializer zeros, for which no key is drawn: older seeds give the same weights
        start = bias_init(rngs.params(), (d_out,)) if bias_init else jnp.zeros(d_out)
        self.bias = nnx.Param(start) if use_bias else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        kernel = self.kernel[...].astype(x.dtype)
        if self.size == 1:
            x = matmul_2d(x[:, :: self.stride, :: self.stride], kernel, x.dtype)
        else:
            strides, dilations = (self.stride,) * 2, (self.dilation,) * 2
            pads = ((self.size // 2 * self.dilation,) * 2,) * 2
            x = jax.lax.conv_general_dilated(
                *(x, kernel, strides, pads),
                rhs_dilation=dilations,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return x if self.bias is None else x + _as_row(self.bias[...].astype(x.dtype), 4)


class NormStatistic(nnx.Variable):
    """A value of a BatchNorm: saved and loaded with the model, never trained by gradients."""


class MovingStatistic(NormStatistic):
    """One that moves: in training a network leaves its new value in it, which the step takes."""


class FrozenBatchNorm(nnx.Module):
    """The pretrained backbone's BatchNorm, all fixed: an affine map of each channel."""

    def __init__(self, d: int):
        self.scale = NormStatistic(jnp.ones(d))
        self.bias = NormStatistic(jnp.zeros(d))
        self.mean = NormStatistic(jnp.zeros(d))
        self.var = NormStatistic(jnp.ones(d))

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + NORM_EPSILON)
        offset = self.bias[...] - self.mean[...] * scale
        scale, offset = (_as_row(value.astype(x.dtype), 4) for value in (scale, offset))
        return x * scale + offset


@dataclasses.dataclass(frozen=True)
class BatchNormKind:
    """The conventions of a trained BatchNorm; the defaults are PyTorch's."""

    epsilon: float = NORM_EPSILON
    momentum: float = 0.1  # weight of the new batch in the moving statistics
    # of maps, and of vectors: whether the variance that is stored is n / (n - 1) times the batch's
    unbiased: tuple[bool, bool] = (True, True)


class BatchNorm(nnx.Module):
    """Batch normalization over all axes but the last: in training by the batch of this device."""

    def __init__(self, d: int, kind: BatchNormKind):
        self.kind, self.training = kind, False
        self.scale, self.bias = nnx.Param(jnp.ones(d)), nnx.Param(jnp.zeros(d))
        self.mean, self.var = MovingStatistic(jnp.zeros(d)), MovingStatistic(jnp.ones(d))

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        exact = x.astype(jnp.float32)
        mean, variance = self.mean[...], self.var[...]
        if self.training:
            axes = tuple(range(x.ndim - 1))
            mean = exact.mean(axes)
            variance = jnp.square(exact - mean).mean(axes)
            self._move(mean, variance, math.prod(x.shape[:-1]), vectors=x.ndim < 4)
        unit = (exact - mean) * jax.lax.rsqrt(variance + self.kind.epsilon)
        return scale_and_shift(unit, self.scale[...], self.bias[...]).astype(x.dtype)

    def _move(self, mean: jax.Array, variance: jax.Array, n: int, *, vectors: bool) -> None:
        if n < 2:
            remedy = "set config.train.batch_size to two or more for each device and part"
            raise UserError(f"one person alone has no variance for a batch norm: {remedy}")
        if self.kind.unbiased[vectors]:
            variance = variance * (n / (n - 1))
        for moving, new in ((self.mean, mean), (self.var, variance)):
            moving[...] += self.kind.momentum * (jax.lax.stop_gradient(new) - moving[...])


class GroupNorm(nnx.Module):
    """Group normalization of NHWC maps, the same on one device and on many (Wu & He 2018)."""

    def __init__(self, d: int, *, num_groups: int):
        self.num_groups = num_groups
        self.scale = nnx.Param(jnp.ones(d))
        self.bias = nnx.Param(jnp.zeros(d))

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        # Reduced by channel first: splitting the channel axis of the whole map into groups is four
        # times slower on the CPU.
        mean = self._over_groups(x.astype(jnp.float32).mean((1, 2)))
        centered = x - mean
        variance = self._over_groups(jnp.square(centered).mean((1, 2)))
        unit = centered * jax.lax.rsqrt(variance + NORM_EPSILON)
        return scale_and_shift(unit, self.scale[...], self.bias[...]).astype(x.dtype)

    def _over_groups(self, channels: Float[Array, "b d"]) -> Float[Array, "b 1 1 d"]:
        b, d = channels.shape
        size = d // self.num_groups
        means = channels.reshape(b, self.num_groups, size).mean(-1)
        return jnp.repeat(means, size, axis=1)[:, None, None]


class InputProjection(nnx.Module):
    """Convolution to the hidden size, 1x1 or 3x3 with stride 2, and norm over 32 groups."""

    def __init__(self, d_in: int, d: int, *, strided: bool, rngs: nnx.Rngs):
        size, stride = (3, 2) if strided else (1, 1)
        start: dict[str, Any] = {"use_bias": True, "kernel_init": xavier_uniform}
        self.conv = Conv(d_in, d, size, stride=stride, **start, rngs=rngs)
        self.norm = GroupNorm(d, num_groups=32)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return self.norm(self.conv(x))
