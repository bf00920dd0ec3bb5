"""The networks in plain PyTorch, restated from the reference without its dependencies; see `peer.py`.

Maps what each network maps in the reference, MeiGen-AI/InfiniteTalk at 0107cd9: `wan/modules/multitalk_model.py`
and `attention.py` (Dit), `vae.py` (Vae), `clip.py` (Clip), `t5.py` (Umt5), `src/audio_analysis/wav2vec2.py` (Wav2Vec2).
Tensor names are those of the published weights, so that the reference's outputs can be checked.
Different from the reference, always in PyTorch's favour: float32 rotary instead of float64, keys and values of
text, image and audio computed once per scene and window instead of once per pass, attention by
`scaled_dot_product_attention`. One person only: no attention map.
"""
import json, math, pathlib

import numpy as np
import torch
import torch.nn.functional as F

FPS, SAMPLE_RATE = 25, 16000
# PyTorch's conv3d has no fast kernel for the CPU, its conv2d has. The reference does not make use of that.
CONV3D_BY_CONV2D = False
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
LATENT_MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
LATENT_STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]


# ------------------------------------------------------------------ weights and shared layers

def read_safetensors(path):
    """A file's tensors by name; the format is a JSON header of offsets before the bytes."""
    data = pathlib.Path(path).read_bytes()
    size = int.from_bytes(data[:8], "little")
    kinds = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "U8": np.uint8}
    tensors = {}
    for name, entry in json.loads(data[8:8 + size]).items():
        if name != "__metadata__":
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            array = np.frombuffer(data[start:end], kinds[entry["dtype"]]).reshape(entry["shape"])
            tensors[name] = torch.from_numpy(array.copy())
    return tensors


class Weights:
    """Tensors below a prefix, from a file or drawn on the default device: gains 1, all else normal / sqrt(inputs)."""

    def __init__(self, tensors=None, prefix="", generator=None, dtype=torch.float32):
        self.tensors, self.prefix, self.dtype = tensors, prefix, dtype
        self.generator = generator or torch.Generator(torch.get_default_device()).manual_seed(0)

    def pp(self, name):
        return Weights(self.tensors, f"{self.prefix}{name}.", self.generator, self.dtype)

    def get(self, shape, name="weight"):
        if self.tensors is not None:
            return self.tensors[self.prefix + name].reshape(shape)
        if name in ("gamma", "weight_g") or (name == "weight" and len(shape) == 1):
            return torch.ones(shape, dtype=self.dtype)
        drawn = torch.randn(shape, generator=self.generator, dtype=self.dtype)
        return drawn.div_(math.sqrt(max(1, math.prod(shape[1:]))))


class Linear:
    def __init__(self, vb, inputs, outputs, bias=True):
        self.w, self.b = vb.get((outputs, inputs)), vb.get((outputs,), "bias") if bias else None

    def __call__(self, xs):
        return F.linear(xs, self.w, self.b)


class LayerNorm:
    def __init__(self, vb, dim, eps):
        self.w, self.b, self.eps = vb.get((dim,)), vb.get((dim,), "bias"), eps

    def __call__(self, xs):
        return F.layer_norm(xs, self.w.shape, self.w, self.b, self.eps)


class RmsNorm:
    def __init__(self, vb, dim, eps):
        self.w, self.eps = vb.get((dim,)), eps

    def __call__(self, xs):
        return F.rms_norm(xs, self.w.shape, self.w, self.eps)


def attention(q, k, v, scale=None, bias=None):
    """(B, L, N, D) each; the result (B, L, N * D)."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=bias, scale=scale).transpose(1, 2).flatten(2)


# ------------------------------------------------------------------ wav2vec2

class Wav2Vec2:
    def __init__(self, cfg, vb):
        self.cfg, vb = cfg, vb.pp("wav2vec2")
        self.convs, channels = [], 1
        for i, (out, kernel) in enumerate(zip(cfg["conv_dim"], cfg["conv_kernel"])):
            conv = vb.pp(f"feature_extractor.conv_layers.{i}")
            norm = (conv.pp("layer_norm").get((out,)), conv.pp("layer_norm").get((out,), "bias")) if i == 0 else None
            self.convs.append((conv.pp("conv").get((out, channels, kernel)), norm))
            channels = out
        dim, eps = cfg["hidden_size"], cfg["layer_norm_eps"]
        self.norm = LayerNorm(vb.pp("feature_projection.layer_norm"), channels, eps)
        self.projection = Linear(vb.pp("feature_projection.projection"), channels, dim)
        taps, self.groups = cfg["num_conv_pos_embeddings"], cfg["num_conv_pos_embedding_groups"]
        conv = vb.pp("encoder.pos_conv_embed.conv")
        v = conv.get((dim, dim // self.groups, taps), "weight_v")
        self.pos = conv.get((1, 1, taps), "weight_g") * v / v.norm(dim=(0, 1), keepdim=True), conv.get((dim,), "bias")
        self.encoder_norm = LayerNorm(vb.pp("encoder.layer_norm"), dim, eps)
        self.layers = []
        for i in range(cfg["num_hidden_layers"]):
            layer = vb.pp(f"encoder.layers.{i}")
            names = [f"attention.{x}_proj" for x in ("q", "k", "v", "out")]
            self.layers.append((
                [Linear(layer.pp(name), dim, dim) for name in names],
                LayerNorm(layer.pp("layer_norm"), dim, eps),
                Linear(layer.pp("feed_forward.intermediate_dense"), dim, cfg["intermediate_size"]),
                Linear(layer.pp("feed_forward.output_dense"), cfg["intermediate_size"], dim),
                LayerNorm(layer.pp("final_layer_norm"), dim, eps)))

    def __call__(self, samples):
        """(samples) at 16 kHz to (frames, layers, D)."""
        frames = int(len(samples) / SAMPLE_RATE * FPS)
        xs = ((samples - samples.mean()) / torch.sqrt(samples.var(unbiased=False) + 1e-7))[None, None]
        for (weight, norm), stride in zip(self.convs, self.cfg["conv_stride"]):
            xs = F.conv1d(xs, weight, stride=stride)
            if norm:
                xs = F.group_norm(xs, xs.shape[1], *norm, 1e-5)
            xs = F.gelu(xs)
        xs = F.interpolate(xs, size=frames, mode="linear", align_corners=True).transpose(1, 2)
        xs = self.projection(self.norm(xs))
        weight, bias = self.pos
        pos = F.conv1d(xs.transpose(1, 2), weight, bias, padding=weight.shape[2] // 2, groups=self.groups)
        xs = self.encoder_norm(xs + F.gelu(pos[:, :, :-1]).transpose(1, 2))
        heads, outputs = self.cfg["num_attention_heads"], []
        for (q, k, v, out), norm, up, down, final_norm in self.layers:
            xs = norm(xs + out(attention(*(f(xs).unflatten(2, (heads, -1)) for f in (q, k, v)))))
            xs = final_norm(xs + down(F.gelu(up(xs))))
            outputs.append(xs[0])
        return torch.stack(outputs, 1)


# ------------------------------------------------------------------ UMT5 encoder

class Umt5:
    def __init__(self, cfg, vb):
        self.cfg = cfg
        dim, inner, ffn, eps = cfg["dim"], cfg["dim_attn"], cfg["dim_ffn"], cfg.get("eps", 1e-6)
        self.embedding = vb.pp("token_embedding").get((cfg["vocab"], dim))
        self.blocks = []
        for i in range(cfg["num_layers"]):
            block = vb.pp(f"blocks.{i}")
            self.blocks.append((
                RmsNorm(block.pp("norm1"), dim, eps),
                [Linear(block.pp(f"attn.{x}"), dim, inner, bias=False) for x in "qkv"],
                Linear(block.pp("attn.o"), inner, dim, bias=False),
                block.pp("pos_embedding.embedding").get((cfg["num_buckets"], cfg["num_heads"])),
                RmsNorm(block.pp("norm2"), dim, eps),
                Linear(block.pp("ffn.gate.0"), dim, ffn, bias=False),
                Linear(block.pp("ffn.fc1"), dim, ffn, bias=False),
                Linear(block.pp("ffn.fc2"), ffn, dim, bias=False)))
        self.norm = RmsNorm(vb.pp("norm"), dim, eps)

    def buckets(self, length):
        half = self.cfg["num_buckets"] // 2
        exact = half // 2
        rel = torch.arange(length)[None] - torch.arange(length)[:, None]
        size = rel.abs().clamp(min=1)
        far = exact + (torch.log(size / exact) / math.log(self.cfg["max_dist"] / exact) * (half - exact)).long()
        return torch.where(rel.abs() < exact, rel.abs(), far.clamp(max=half - 1)) + half * (rel > 0)

    def __call__(self, ids):
        """Token ids (L) without padding to (L, D)."""
        xs, buckets, heads = self.embedding[ids][None], self.buckets(len(ids)), self.cfg["num_heads"]
        for norm1, qkv, o, table, norm2, gate, fc1, fc2 in self.blocks:
            ys = norm1(xs)
            q, k, v = (f(ys).unflatten(2, (heads, -1)) for f in qkv)
            xs = xs + o(attention(q, k, v, 1.0, table[buckets].permute(2, 0, 1)[None]))
            ys = norm2(xs)
            xs = xs + fc2(fc1(ys) * F.gelu(gate(ys), approximate="tanh"))
        return self.norm(xs)[0]


# ------------------------------------------------------------------ CLIP visual tower

class Clip:
    def __init__(self, cfg, vb):
        self.cfg, vb = cfg, vb.pp("visual")
        dim, patch, self.size = cfg["vision_dim"], cfg["patch_size"], cfg["image_size"]
        hidden = int(dim * cfg["vision_mlp_ratio"])
        self.patch = vb.pp("patch_embedding").get((dim, 3, patch, patch))
        self.cls = vb.get((1, 1, dim), "cls_embedding")
        self.pos = vb.get((1, (self.size // patch) ** 2 + 1, dim), "pos_embedding")
        self.pre_norm, self.blocks = LayerNorm(vb.pp("pre_norm"), dim, 1e-5), []
        for i in range(cfg["vision_layers"] - 1):  # the last block's output is not used
            block = vb.pp(f"transformer.{i}")
            self.blocks.append((
                LayerNorm(block.pp("norm1"), dim, 1e-5), Linear(block.pp("attn.to_qkv"), dim, 3 * dim),
                Linear(block.pp("attn.proj"), dim, dim), LayerNorm(block.pp("norm2"), dim, 1e-5),
                Linear(block.pp("mlp.0"), dim, hidden), Linear(block.pp("mlp.2"), hidden, dim)))

    def __call__(self, frame):
        """(3, 1, H, W) in [-1, 1] to (1, 257, D)."""
        pixels = F.interpolate(frame[:, 0][None], size=(self.size, self.size), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
        pixels = ((pixels * 0.5 + 0.5 - mean) / std).to(self.patch.dtype)
        xs = F.conv2d(pixels, self.patch, stride=self.patch.shape[-1])
        xs = self.pre_norm(torch.cat([self.cls, xs.flatten(2).transpose(1, 2)], 1) + self.pos)
        for norm1, qkv, proj, norm2, up, down in self.blocks:
            q, k, v = qkv(norm1(xs)).unflatten(2, (3, self.cfg["vision_heads"], -1)).unbind(2)
            xs = xs + proj(attention(q, k, v))
            xs = xs + down(F.gelu(up(norm2(xs))))
        return xs


# ------------------------------------------------------------------ Wan VAE, chunk by chunk with a cache

def conv3d(xs, weight, bias, stride=1, padding=(0, 0)):
    """A 3D convolution without padding in time; in two dimensions frame by frame where CONV3D_BY_CONV2D says so."""
    if not CONV3D_BY_CONV2D:
        return F.conv3d(xs, weight, bias, stride=(stride, 1, 1), padding=(0, *padding))
    frames, taps = xs[0].transpose(0, 1), weight.shape[2]
    last = len(frames) - taps
    parts = [F.conv2d(frames[tap:last + tap + 1:stride], weight[:, :, tap], bias if tap == 0 else None, padding=padding)
             for tap in range(taps)]
    for part in parts[1:]:
        parts[0] += part
    return parts[0].transpose(0, 1)[None]


class CausalConv:
    """3D convolution that keeps its last two input frames for the next chunk."""

    def __init__(self, vb, inputs, outputs, kernel=(3, 3, 3)):
        self.w, self.b = vb.get((outputs, inputs, *kernel)), vb.get((outputs,), "bias")
        self.padding = (kernel[1] // 2, kernel[2] // 2)

    def __call__(self, xs, cache):
        if self.w.shape[2] > 1:
            past = cache.get(self)
            xs = torch.cat([torch.zeros_like(xs[:, :, :1]).expand(-1, -1, 2, -1, -1) if past is None else past, xs], 2)
            cache[self] = xs[:, :, -2:].clone()
        return conv3d(xs, self.w, self.b, padding=self.padding)


class ChannelNorm:
    def __init__(self, vb, dim, ndim):
        self.gamma = vb.get((dim,) + (1,) * ndim, "gamma") * math.sqrt(dim)

    def __call__(self, xs):
        return F.normalize(xs, dim=1) * self.gamma


class ResidualBlock:
    def __init__(self, vb, inputs, outputs):
        self.norms = [ChannelNorm(vb.pp(f"residual.{i}"), dim, 3) for i, dim in ((0, inputs), (3, outputs))]
        self.convs = [CausalConv(vb.pp(f"residual.{i}"), dim, outputs) for i, dim in ((2, inputs), (6, outputs))]
        self.shortcut = CausalConv(vb.pp("shortcut"), inputs, outputs, (1, 1, 1)) if inputs != outputs else None

    def __call__(self, xs, cache):
        ys = xs
        for norm, conv in zip(self.norms, self.convs):
            ys = conv(F.silu(norm(ys)), cache)
        return ys + (self.shortcut(xs, cache) if self.shortcut else xs)


class FrameAttention:
    def __init__(self, vb, dim):
        self.norm = ChannelNorm(vb.pp("norm"), dim, 2)
        layer = lambda name, out: (vb.pp(name).get((out, dim, 1, 1)), vb.pp(name).get((out,), "bias"))
        self.qkv, self.proj = layer("to_qkv", 3 * dim), layer("proj", dim)

    def __call__(self, xs, cache):
        frames = xs[0].transpose(0, 1)  # (T, C, H, W)
        q, k, v = F.conv2d(self.norm(frames), *self.qkv).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, frames.shape[2:])
        return xs + F.conv2d(out, *self.proj).transpose(0, 1)[None]


class Resample:
    """Halves or doubles rows and columns, and where `temporal` also frames."""

    def __init__(self, vb, dim, up, temporal):
        self.up, out = up, dim // 2 if up else dim
        self.conv = vb.pp("resample.1").get((out, dim, 3, 3)), vb.pp("resample.1").get((out,), "bias")
        self.time = None
        if temporal:
            outputs = 2 * dim if up else dim
            self.time = vb.pp("time_conv").get((outputs, dim, 3, 1, 1)), vb.pp("time_conv").get((outputs,), "bias")

    def __call__(self, xs, cache):
        if self.up and self.time:
            xs = self.double(xs, cache)
        frames = xs[0].transpose(0, 1)
        if self.up:
            frames = F.conv2d(F.interpolate(frames, scale_factor=2.0, mode="nearest-exact"), *self.conv, padding=1)
        else:
            frames = F.conv2d(F.pad(frames, (0, 1, 0, 1)), *self.conv, stride=2)
        xs = frames.transpose(0, 1)[None]
        return self.halve(xs, cache) if self.time and not self.up else xs

    def double(self, xs, cache):
        past = cache.get(self)
        if past is None:
            cache[self] = torch.zeros_like(xs[:, :, :1]).expand(-1, -1, 2, -1, -1)
            return xs
        ys = torch.cat([past, xs], 2)
        cache[self] = ys[:, :, -2:].clone()
        return conv3d(ys, *self.time).unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)

    def halve(self, xs, cache):
        past, cache[self] = cache.get(self), xs[:, :, -1:].clone()
        return xs if past is None else conv3d(torch.cat([past, xs], 2), *self.time, stride=2)


class Half:
    """The encoder or the decoder: conv1, then `stem`, head; the middle stands before or after it."""

    def __init__(self, cfg, vb, up):
        mults, blocks = cfg["dim_mult"], cfg["num_res_blocks"] + up
        dims = [cfg["dim"] * m for m in (([mults[-1]] + mults[::-1]) if up else ([1] + mults))]
        temporal = cfg["temperal_downsample"][::-1] if up else cfg["temperal_downsample"]
        name, layers = "upsamples" if up else "downsamples", []
        for level, (inputs, outputs) in enumerate(zip(dims, dims[1:])):
            inputs //= 2 if up and level > 0 else 1
            for _ in range(blocks):
                layers.append(ResidualBlock(vb.pp(f"{name}.{len(layers)}"), inputs, outputs))
                inputs = outputs
            if level + 1 < len(mults):
                layers.append(Resample(vb.pp(f"{name}.{len(layers)}"), outputs, up, temporal[level]))
        inner, z = dims[0] if up else dims[-1], cfg["z_dim"]
        kinds = (ResidualBlock, inner, inner), (FrameAttention, inner), (ResidualBlock, inner, inner)
        middle = [kind(vb.pp(f"middle.{i}"), *args) for i, (kind, *args) in enumerate(kinds)]
        first = CausalConv(vb.pp("conv1"), z if up else 3, dims[0])
        self.layers = [first, *middle, *layers] if up else [first, *layers, *middle]
        self.norm = ChannelNorm(vb.pp("head.0"), dims[-1], 3)
        self.head = CausalConv(vb.pp("head.2"), dims[-1], 3 if up else 2 * z)

    def __call__(self, xs, cache):
        for layer in self.layers:
            xs = layer(xs, cache)
        return self.head(F.silu(self.norm(xs)), cache)


class Vae:
    def __init__(self, cfg, vb):
        z = cfg["z_dim"]
        self.encoder, self.decoder = Half(cfg, vb.pp("encoder"), False), Half(cfg, vb.pp("decoder"), True)
        self.conv1 = CausalConv(vb.pp("conv1"), 2 * z, 2 * z, (1, 1, 1))
        self.conv2 = CausalConv(vb.pp("conv2"), z, z, (1, 1, 1))
        self.mean, self.std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (LATENT_MEAN, LATENT_STD))

    def encode(self, video):
        """(3, F, H, W) in [-1, 1] to normalised latents (16, T, h, w)."""
        cache, xs = {}, video[None]
        chunks = [xs[:, :, :1]] + [xs[:, :, 1 + 4 * i:5 + 4 * i] for i in range((xs.shape[2] - 1) // 4)]
        mean = self.conv1(torch.cat([self.encoder(chunk, cache) for chunk in chunks], 2), {}).chunk(2, 1)[0]
        return ((mean - self.mean) / self.std)[0]

    def decode(self, latents):
        """Normalised latents (16, T, h, w) to (3, F, H, W) in [-1, 1]."""
        cache, xs = {}, self.conv2(latents[None] * self.std + self.mean, {})
        return torch.cat([self.decoder(chunk, cache) for chunk in xs.split(1, 2)], 2)[0].clamp(-1, 1)


# ------------------------------------------------------------------ DiT with audio adapter, one person

class Dit:
    def __init__(self, cfg, vb):
        self.cfg = cfg
        dim, ffn, eps, clip = cfg["dim"], cfg["ffn_dim"], cfg["eps"], cfg["clip_dim"]
        linear = lambda name, i, o: Linear(vb.pp(name), i, o)
        patch = cfg["in_dim"], *cfg["patch_size"]
        self.patch = vb.pp("patch_embedding").get((dim, *patch)), vb.pp("patch_embedding").get((dim,), "bias")
        self.text = linear("text_embedding.0", cfg["text_dim"], dim), linear("text_embedding.2", dim, dim)
        self.time = linear("time_embedding.0", cfg["freq_dim"], dim), linear("time_embedding.2", dim, dim)
        self.time_projection = linear("time_projection.1", dim, 6 * dim)
        self.image = (LayerNorm(vb.pp("img_emb.proj.0"), clip, 1e-5), linear("img_emb.proj.1", clip, clip),
                      linear("img_emb.proj.3", clip, dim), LayerNorm(vb.pp("img_emb.proj.4"), dim, 1e-5))
        slot, hidden, audio_dim = cfg["audio_blocks"] * cfg["audio_channels"], cfg["intermediate_dim"], cfg["output_dim"]
        names = "audio_proj.proj1", "audio_proj.proj1_vf", "audio_proj.proj2", "audio_proj.proj3"
        sizes = (cfg["audio_window"] * slot, hidden), ((cfg["audio_window"] + cfg["vae_scale"] - 1) * slot, hidden), \
            (hidden, hidden), (hidden, cfg["context_tokens"] * audio_dim)
        self.audio_proj = [linear(name, *size) for name, size in zip(names, sizes)]
        self.audio_norm = LayerNorm(vb.pp("audio_proj.norm"), audio_dim, 1e-5)
        self.blocks = []
        for i in range(cfg["num_layers"]):
            b = vb.pp(f"blocks.{i}")
            layers = {name: Linear(b.pp(name), dim, dim) for name in (
                *(f"self_attn.{x}" for x in "qkvo"), *(f"cross_attn.{x}" for x in ("q", "k", "v", "o", "k_img", "v_img")),
                "audio_cross_attn.q_linear", "audio_cross_attn.proj")}
            layers |= {name: RmsNorm(b.pp(name), dim, eps) for name in (
                "self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k", "cross_attn.norm_k_img")}
            layers |= {name: LayerNorm(b.pp(name), dim, eps) for name in ("norm3", "norm_x")}
            layers["audio_cross_attn.kv_linear"] = Linear(b.pp("audio_cross_attn.kv_linear"), audio_dim, 2 * dim)
            layers["ffn.0"], layers["ffn.2"] = Linear(b.pp("ffn.0"), dim, ffn), Linear(b.pp("ffn.2"), ffn, dim)
            layers["modulation"] = b.get((1, 6, dim), "modulation")
            self.blocks.append(layers)
        self.head, self.head_modulation = linear("head.head", dim, 4 * cfg["out_dim"]), vb.get((1, 2, dim), "head.modulation")
        self.rope_tables = {}

    def split(self, xs):
        return xs.unflatten(2, (self.cfg["num_heads"], -1))

    def encode_context(self, context, image_embeds):
        """Keys and values of every block for a prompt (n, text_dim) and a portrait (1, 257, clip_dim)."""
        text = F.pad(context, (0, 0, 0, self.cfg["text_len"] - len(context)))[None]
        text = self.text[1](F.gelu(self.text[0](text), approximate="tanh"))
        norm_in, up, out, norm_out = self.image
        image = norm_out(out(F.gelu(up(norm_in(image_embeds)))))
        return [[self.split(x) for x in (
            b["cross_attn.norm_k"](b["cross_attn.k"](text)), b["cross_attn.v"](text),
            b["cross_attn.norm_k_img"](b["cross_attn.k_img"](image)), b["cross_attn.v_img"](image))] for b in self.blocks]

    def encode_audio(self, windows):
        """Keys and values of every block for one person's windows (1, F, 5, layers, channels)."""
        mid = windows.shape[2] // 2
        first, later = windows[:, :1].flatten(2), windows[:, 1:].unflatten(1, (-1, 4))
        later = torch.cat([later[:, :, 0, :mid + 1], later[:, :, 1:-1, mid], later[:, :, -1, mid:]], 2).flatten(2)
        proj1, proj1_vf, proj2, proj3 = self.audio_proj
        xs = torch.cat([F.relu(proj1(first)), F.relu(proj1_vf(later))], 1)
        xs = proj3(F.relu(proj2(xs)))[0].unflatten(1, (self.cfg["context_tokens"], -1))  # (T, A, width)
        xs = self.audio_norm(xs)
        return [b["audio_cross_attn.kv_linear"](xs).unflatten(2, (2, self.cfg["num_heads"], -1)).unbind(2) for b in self.blocks]

    def rope(self, grid):
        """cos + i sin of every token's angles, (L, 1, head_dim / 2)."""
        if grid not in self.rope_tables:
            head = self.cfg["dim"] // self.cfg["num_heads"]
            widths = head - 4 * (head // 6), 2 * (head // 6), 2 * (head // 6)
            positions = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
            angles = [p.flatten()[:, None].double() * 10000.0 ** (-torch.arange(0, w, 2).double() / w)
                      for p, w in zip(positions, widths)]
            angles = torch.cat(angles, 1)[:, None]
            self.rope_tables[grid] = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        return self.rope_tables[grid]

    def embed(self, latents, y, t):
        xs = F.conv3d(torch.cat([latents, y])[None], *self.patch, stride=self.cfg["patch_size"])
        half = self.cfg["freq_dim"] // 2
        angles = float(t) * 10000.0 ** (-torch.arange(half).double() / half)
        angles = torch.cat([angles.cos(), angles.sin()]).to(self.head.w.dtype)
        temb = self.time[1](F.silu(self.time[0](angles[None])))
        modulation = self.time_projection(F.silu(temb)).unflatten(1, (6, -1))
        return xs.flatten(2).transpose(1, 2), tuple(xs.shape[2:]), temb, modulation

    def run(self, embedded, context, audio):
        """The velocity (16, T, h, w) from what `embed`, `encode_context` and `encode_audio` return."""
        xs, grid, temb, modulation = embedded
        (dim, eps), rope = (self.cfg["dim"], self.cfg["eps"]), self.rope(grid)
        norm = lambda xs: F.layer_norm(xs, (dim,), eps=eps)
        pairs = lambda xs: torch.view_as_complex(self.split(xs).float().unflatten(3, (-1, 2)))
        rotate = lambda xs: torch.view_as_real(pairs(xs) * rope).flatten(3).to(xs.dtype)
        for b, (k_text, v_text, k_image, v_image), (k_audio, v_audio) in zip(self.blocks, context, audio):
            shift1, scale1, gate1, shift2, scale2, gate2 = (b["modulation"] + modulation).chunk(6, 1)
            ys = norm(xs) * (1 + scale1) + shift1
            q, k = (rotate(b[f"self_attn.norm_{x}"](b[f"self_attn.{x}"](ys))) for x in "qk")
            xs = xs + b["self_attn.o"](attention(q, k, self.split(b["self_attn.v"](ys)))) * gate1
            q = self.split(b["cross_attn.norm_q"](b["cross_attn.q"](b["norm3"](xs))))
            xs = xs + b["cross_attn.o"](attention(q, k_text, v_text) + attention(q, k_image, v_image))
            q = self.split(b["audio_cross_attn.q_linear"](b["norm_x"](xs)).unflatten(1, (grid[0], -1))[0])
            xs = xs + b["audio_cross_attn.proj"](attention(q, k_audio, v_audio).flatten(0, 1))[None]
            ys = norm(xs) * (1 + scale2) + shift2
            xs = xs + b["ffn.2"](F.gelu(b["ffn.0"](ys), approximate="tanh")) * gate2
        shift, scale = (self.head_modulation + temb[:, None]).chunk(2, 1)
        xs = self.head(norm(xs) * (1 + scale) + shift)[0]
        xs = xs.unflatten(0, grid).unflatten(3, (1, 2, 2, -1)).permute(6, 0, 3, 1, 4, 2, 5)
        return xs.reshape(xs.shape[0], grid[0], 2 * grid[1], 2 * grid[2])
