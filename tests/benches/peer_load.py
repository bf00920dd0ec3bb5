"""The same files with PyTorch: `peer_load.py DTYPE FILES…` prints the seconds from files to tensors of the dtype."""
import sys
import time

import torch
from safetensors.torch import load_file

dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[sys.argv[1]]
began = time.perf_counter()
tensors = {}
for path in sys.argv[2:]:
    loaded = load_file(path) if path.endswith(".safetensors") else torch.load(path, map_location="cpu")
    for name, tensor in loaded.items():
        # As the tensors of a file that is mapped are read when they are used.
        tensors[name] = tensor.to(dtype, copy=True)
    del loaded
print(time.perf_counter() - began)
