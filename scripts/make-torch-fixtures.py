#!/usr/bin/env python3
"""Writes tests/media/torch-*.pth with torch itself (2.15), and what it says is in them as torch-expected.safetensors.

    pip install torch safetensors numpy && scripts/make-torch-fixtures.py
"""
import pathlib

import torch
from safetensors.torch import save_file

MEDIA = pathlib.Path(__file__).resolve().parent.parent / "tests" / "media"


def main():
    base = ((torch.arange(60) % 13).float() - 4 * (torch.arange(60) % 2)).reshape(6, 10)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) - i)
    halves = base.to(torch.bfloat16)
    content = {
        "f64": base.double(),
        "f32": base,
        "again": base.flatten(),
        "transposed": base.t(),
        "part": base[2:4, 3:],
        "every_third": base.flatten()[2::3],
        "bf16": halves,
        "bf16_permuted": halves.reshape(6, 5, 2).permute(1, 2, 0),
        "f16": base.half(),
        "i8": base.to(torch.int8),
        "u8": base.abs().to(torch.uint8),
        "e4m3": base.to(torch.float8_e4m3fn),
        "e5m2": base.to(torch.float8_e5m2),
        "i64": base.long(),
        "mask": base > 0,
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base.clone()),
        "step": 3,
        "note": "text",
        "lr": 0.5,
        "nothing": None,
        "betas": (0.9, 0.999),
        "module": module.state_dict(),
        "list": [base[0].clone(), {"x": base[1].clone()}],
    }
    torch.save(content, MEDIA / "torch-dict.pth")
    torch.save(content, MEDIA / "torch-dict-protocol-5.pth", pickle_protocol=5)
    torch.save({"state_dict": module.state_dict(), "epoch": 1}, MEDIA / "torch-wrapped.pth")
    torch.save(module.state_dict(), MEDIA / "torch-legacy.pth", _use_new_zipfile_serialization=False)

    expected = {}

    def flatten(name, item):
        if isinstance(item, torch.Tensor):
            expected[name] = item.detach().float().contiguous().clone()
        elif isinstance(item, dict):
            for key, value in item.items():
                flatten(f"{name}.{key}".lstrip("."), value)
        elif isinstance(item, (list, tuple)):
            for i, value in enumerate(item):
                flatten(f"{name}.{i}", value)

    flatten("", content)
    save_file(expected, MEDIA / "torch-expected.safetensors")


main()
