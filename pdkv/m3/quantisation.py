"""How weights are quantised: MXFP8 in any spelling of a config is served, everything else is refused by its name."""

from pdkv.errors import ModelError
from pdkv.m3.config_fields import Fields, agreed

GROUP = 32
"""Elements of MXFP8 under one scale, neighbours along the input dimension."""

SCALE_SUFFIX = "_scale_inv"
"""A weight's scales are named as it is, with this behind; despite the name they are multiplied with."""

FIELD = "quantization_config"

_METHOD = "quant_method"
_SERVED: dict[str, tuple[object, ...]] = {
    _METHOD: ("mxfp8", "fp8"),
    "activation_scheme": ("dynamic",),
    "fmt": ("e4m3", "float8_e4m3fn"),
    "group_size": (GROUP,),
    "scale_fmt": ("ue8m0", "e8m0"),
    "weight_block_size": ([1, GROUP],),
}
"""Its fields with the values served. How activations were to be rounded does not matter: ours are not."""
_FINER = ("quant_algo", "format", "bits")
"""Fields in which others say what their method is; for messages."""
_WITHOUT_EFFECT = ("ignore", "ignored_layers", "modules_to_not_convert")
"""Which weights stay plain; each tensor's own dtype says so too."""


def quantisation(text: Fields, wrapper: Fields) -> str:
    """``none`` or ``mxfp8``. Raises ``ModelError`` naming a method, or a field of it, that is not served."""
    said = {f.named(FIELD): _read(f.inner(FIELD)) for f in (text, wrapper) if f.has(FIELD)}
    return agreed("how weights are quantised", said, "none")


def scale_columns(columns: range) -> range:
    """Which scales a run of columns needs, also where it begins or ends inside a group."""
    return range(columns.start // GROUP, -(-columns.stop // GROUP))


def _read(fields: Fields) -> str:
    method = fields.values.get(_METHOD)
    if method not in _SERVED[_METHOD]:
        finer = "".join(f" ({name} {fields.values[name]!r})" for name in _FINER if fields.has(name))
        raise ModelError(
            f"{fields.named(_METHOD)} is {method!r}{finer}, served are plain weights and MXFP8 "
            f"(mxfp8, or fp8 with weight_block_size [1, {GROUP}])"
        )
    if method == "fp8" and not fields.has("weight_block_size"):
        raise ModelError(
            f"{fields.named('weight_block_size')} is missing: fp8 weights are served with [1, {GROUP}] alone"
        )
    for name, value in fields.values.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name not in _SERVED:
            raise ModelError(f"{fields.named(name)} is not a field that pdkv knows (it may change the answers)")
        if value not in _SERVED[name]:
            raise ModelError(
                f"{fields.named(name)} is {value!r}, only {' or '.join(map(repr, _SERVED[name]))} is implemented"
            )
    return "mxfp8"
