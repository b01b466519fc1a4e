"""Rewrites a random checkpoint in MXFP8, and writes what its weights then are for the oracle."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import released_tensors, write_released_form, write_shards

PLAIN = ("norm.weight", "embed_tokens.weight", "lm_head.weight", ".gate.weight", "e_score_correction_bias")
"""What a quantised release leaves as it is: its names end so."""

QUANTIZATION = {
    "quant_method": "mxfp8",
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head", "gate"],
    "scale_fmt": "ue8m0",
    "weight_block_size": [1, 32],
}


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., columns] to e4m3 of the same shape and E8M0 bytes [..., groups]; the last group may be short."""
    columns = weight.shape[-1]
    num_groups = -(-columns // 32)
    padded = torch.nn.functional.pad(weight, (0, num_groups * 32 - columns)).unflatten(-1, (num_groups, 32))
    exponents = padded.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 8
    elements = (padded * torch.exp2(-exponents)[..., None]).flatten(-2)[..., :columns]
    return elements.clamp(-448, 448).to(torch.float8_e4m3fn), (exponents + 127).to(torch.uint8)


def dequantised(elements: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What they mean, in float64 and column by column: slow, and nothing like the loader."""
    out = elements.double()
    for column in range(elements.shape[-1]):
        out[..., column] *= 2.0 ** (scales[..., column // 32].double() - 127)
    return out.float()


def write_mxfp8(
    source: Path, target: Path, oracle: Path, *, released: bool = True, shards: int = 3, e8m0: bool = False
) -> None:
    """``source``: as ``write_random_checkpoint`` wrote it; ``oracle`` gets the same model in the form of ``source``.

    Quantised are all matrices but embedding, head and routers, and but one q_proj, which stays bfloat16.
    """
    tensors = load_file(source / "model.safetensors")
    elements, scales, exact = {}, {}, {}
    for name, tensor in tensors.items():
        if name.endswith(PLAIN):
            exact[name] = elements[name] = tensor
        elif name.endswith("1.self_attn.q_proj.weight"):
            exact[name], elements[name] = tensor.bfloat16().float(), tensor.bfloat16()
        else:
            elements[name], scales[name] = quantise(tensor)
            exact[name] = dequantised(elements[name], scales[name])
    oracle.mkdir(parents=True, exist_ok=True)
    save_file(exact, oracle / "model.safetensors", {"format": "pt"})
    (oracle / "config.json").write_bytes((source / "config.json").read_bytes())
    if e8m0:
        scales = {name: tensor.view(torch.float8_e8m0fnu) for name, tensor in scales.items()}
    if released:
        write_released_form(source, target)
        for old in target.glob("model*.safetensors*"):
            old.unlink()
        prefix = "language_model."
        elements, scales = released_tensors(elements, prefix), released_tensors(scales, prefix)
    else:
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_bytes((source / "config.json").read_bytes())
    write_shards(target, {**elements, **{f"{name}_scale_inv": t for name, t in scales.items()}}, shards)
    change_config(target, quantization_config=QUANTIZATION)


def change_config(directory: Path, **changed: object) -> None:
    """Top-level fields; None takes one away."""
    raw = json.loads((directory / "config.json").read_text()) | changed
    (directory / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
