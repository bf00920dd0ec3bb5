#!/usr/bin/env python3
"""Times the same stages as `handler bench` in plain PyTorch; not part of the build, of CI or of any test.

Maps a description of stages (`handler bench --describe`) to one JSON line per stage:
{"stage", "median_ms", "best_ms", "runs"}. The networks are in `peer_networks.py`; here are the window loop of
`wan/multitalk.py` (MeiGen-AI/InfiniteTalk at 0107cd9), the clock and the check against the reference's outputs.
Different from the reference, always in PyTorch's favour: what does not change is encoded once, passes that a scale
of 1 cancels are not run, colour matching runs in torch instead of scikit-image.

On a GPU (a description by `handler bench --device cuda`): the dtypes are those of the description, attention is what
`scaled_dot_product_attention` chooses, convolutions in f32 may use TF32, as PyTorch does by default.

    pip install torch==2.15.0 numpy==2.4.6
    handler bench --describe | python3 tests/benches/peer.py --runs 5
    python3 tests/benches/peer.py --check GOLDENS     # the peer computes what the reference computes
"""
import argparse, json, math, pathlib, statistics, sys, time

import torch

import peer_networks
from peer_networks import Clip, Dit, Umt5, Vae, Wav2Vec2, Weights, attention, read_safetensors

TOLERANCE = 1e-4
# Each window feeds the next, and colour matching amplifies rounding: windows 0, 1 and the later ones.
WINDOW_TOLERANCES = 2e-4, 2e-3, 1e-2
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "u8": torch.uint8}
KINDS = {"dit": Dit, "vae": Vae, "clip": Clip, "wav2vec2": Wav2Vec2, "umt5": Umt5}


# ------------------------------------------------------------------ colour matching

RGB_TO_XYZ = torch.tensor([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
XYZ_TO_RGB = RGB_TO_XYZ.double().inverse().float()
WHITE = torch.tensor([0.95047, 1.0, 1.08883])


def rgb_to_lab(rgb):
    """(..., 3) in [0, 1] to CIELAB."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ RGB_TO_XYZ.T / WHITE
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=0) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def lab_to_rgb(lab):
    """CIELAB to (..., 3), clipped to [0, 1]."""
    y = (lab[..., 0] + 16) / 116
    f = torch.stack([lab[..., 1] / 500 + y, y, (y - lab[..., 2] / 200).clamp(min=0)], -1)
    rgb = torch.where(f > 0.2068966, f ** 3, (f - 16 / 116) / 7.787) * WHITE @ XYZ_TO_RGB.T
    return torch.where(rgb > 0.0031308, 1.055 * rgb.clamp(min=0) ** (1 / 2.4) - 0.055, rgb * 12.92).clamp(0, 1)


def match_colors(video, reference, strength):
    """Gives each frame of (3, F, H, W) the mean and deviation of the reference frame (3, 1, H, W) in CIELAB."""
    rgb, ref = (((x.permute(1, 2, 3, 0) + 1) / 2).clamp(0, 1) for x in (video, reference))
    lab, ref = rgb_to_lab(rgb), rgb_to_lab(ref)
    (std, mean), (ref_std, ref_mean) = (torch.std_mean(x, (1, 2), correction=0, keepdim=True) for x in (lab, ref))
    matched = torch.where(std == 0, ref_mean, (lab - mean) * (ref_std / std) + ref_mean)
    return ((1 - strength) * rgb + strength * lab_to_rgb(matched)).permute(3, 0, 1, 2) * 2 - 1


# ------------------------------------------------------------------ whole video

def timesteps(steps, shift):
    u = torch.cat([torch.linspace(1000, 1, steps), torch.zeros(1)]) / 1000
    return shift * u / (1 + (shift - 1) * u) * 1000


def audio_window(embeds, start, frames, is_last):
    """The embeddings of two frames before to two after each frame, (1, F, 5, layers, channels)."""
    missing = start + frames - len(embeds) + 3
    if is_last and start > 0 and missing >= 3:
        embeds = torch.cat([embeds, embeds[-missing:].flip(0)])
    index = torch.arange(start, start + frames)[:, None] + torch.arange(-2, 3)
    return embeds[index.clamp(0, len(embeds) - 1)][None]


def denoise(dit, v, noise, motion_latents, y, contexts, audio, silence):
    """Euler steps over the guided velocity; the motion latents stand in front before every pass and at the end."""
    (prompt, negative), (text, voice) = contexts, (v["text_guidance"], v["audio_guidance"])
    with_motion = lambda latents: torch.cat([motion_latents, latents[:, motion_latents.shape[1]:]], 1)
    latents, ts = with_motion(noise), timesteps(v["steps"], v["shift"])
    for t, t_next in zip(ts, ts[1:]):
        embedded = dit.embed(latents, y, t)
        cond = velocity = dit.run(embedded, prompt, audio)
        if not math.isclose(text, 1):
            drop_text = dit.run(embedded, negative, audio)
            velocity = cond + (text - 1) * (cond - drop_text)
        if not math.isclose(voice, 1):
            heard = cond if math.isclose(text, 1) else drop_text
            unheard = dit.run(embedded, prompt if math.isclose(text, 1) else negative, silence)
            velocity = velocity + (voice - 1) * (heard - unheard)
        latents = with_motion(latents - velocity * ((t - t_next) / 1000))
    return latents


def make_video(networks, v, portrait, embeds, context, negative_context, noise):
    """All frames (3, F, H, W) of a video, window by window; `noise(window, shape)` draws."""
    dit, vae, frames, motion_frames = networks["dit"], networks["vae"], v["frames_per_window"], v["motion_frames"]
    wanted, stride = min(v["frames"], len(embeds)), frames - motion_frames
    windows = 1 + max(0, math.ceil((wanted - frames) / stride))
    image_embeds = networks["clip"](portrait)
    contexts = dit.encode_context(context, image_embeds), None
    if not math.isclose(v["text_guidance"], 1):
        contexts = contexts[0], dit.encode_context(negative_context, image_embeds)
    reference = vae.encode(torch.cat([portrait, portrait.new_zeros(3, frames - 1, *portrait.shape[2:])], 1))
    mask = torch.zeros(4, *reference.shape[1:])
    mask[:, 0] = 1
    y, motion, parts = torch.cat([mask, reference]), None, []
    silence = dit.encode_audio(torch.zeros_like(audio_window(embeds, 0, frames, False)))
    for w in range(windows):
        audio = dit.encode_audio(audio_window(embeds, w * stride, frames, w + 1 == windows))
        motion_latents = reference[:, :1] if w == 0 else vae.encode(motion)
        latents = denoise(dit, v, noise(w, reference.shape), motion_latents, y, contexts, audio, silence)
        video = vae.decode(latents)
        if v["color_correction"] > 0:
            video = match_colors(video, portrait, v["color_correction"])
        motion = video[:, -motion_frames:]
        parts.append(video if w == 0 else video[:, motion_frames:])
    return torch.cat(parts, 1)[:, :wanted]


# ------------------------------------------------------------------ stages

def prepare(stage):
    """The function that one stage times, or None for a stage that has no counterpart here."""
    device, dtype = torch.get_default_device(), DTYPES[stage["dtype"]]
    kind, rand = stage["kind"], lambda *shape: torch.randn(shape, generator=torch.Generator(device).manual_seed(1))
    network = lambda name: KINDS[name](stage["network"], Weights(dtype=dtype))
    if kind == "attention":
        q, k, v = (rand(*stage["shape"]).to(dtype) for _ in range(3))
        return lambda: attention(q, k, v)
    if kind == "wav2vec2":
        net, samples = network("wav2vec2"), rand(stage["samples"])
        return lambda: net(samples)
    if kind == "umt5":
        net = network("umt5")
        ids = torch.arange(stage["tokens"]) % net.cfg["vocab"]
        return lambda: net(ids)
    if kind == "clip":
        net, frame = network("clip"), rand(3, 1, stage["height"], stage["width"])
        return lambda: net(frame)
    if kind == "vae_encode":
        net, video = network("vae"), rand(3, stage["frames"], stage["height"], stage["width"]).clamp(-1, 1)
        return lambda: net.encode(video)
    if kind == "vae_decode":
        net, latents = network("vae"), rand(*stage["latents"])
        return lambda: net.decode(latents)
    if kind == "dit_forward":
        drawn = lambda *shape: rand(*shape).to(dtype)
        net, latents = network("dit"), drawn(*stage["latents"])
        cfg, frames = net.cfg, 4 * latents.shape[1] - 3
        context = net.encode_context(drawn(stage["tokens"], cfg["text_dim"]), drawn(1, 257, cfg["clip_dim"]))
        audio = net.encode_audio(drawn(1, frames, cfg["audio_window"], cfg["audio_blocks"], cfg["audio_channels"]))
        y = drawn(cfg["in_dim"] - cfg["out_dim"], *latents.shape[1:])
        return lambda: net.run(net.embed(latents, y, 857.3), context, audio)
    if kind == "video":
        networks = {name: network(stage["networks"][name], Weights()) for name, network in KINDS.items()}
        samples, portrait = rand(stage["samples"]), rand(3, 1, stage["height"], stage["width"]).clamp(-1, 1)
        ids = torch.arange(stage["tokens"]) % networks["umt5"].cfg["vocab"]

        def video():
            embeds, context = networks["wav2vec2"](samples), networks["umt5"](ids)
            frames = make_video(networks, stage, portrait, embeds, context, context, lambda w, shape: rand(*shape))
            return ((frames + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        return video
    return None


def measure(work, runs):
    """Milliseconds of each of `runs` calls after a first one that is not counted."""
    def once():
        start = time.perf_counter()
        work()
        if torch.get_default_device().type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3
    once()
    return [once() for _ in range(runs)]


# ------------------------------------------------------------------ check against the reference

class Check:
    """Compares with the reference's outputs in a folder of goldens."""

    def __init__(self, folder):
        self.folder, self.failed = pathlib.Path(folder), False

    def config(self, component):
        config = json.loads((self.folder / component / "config.json").read_text())
        return config.get("model", config)

    def load(self, path):
        return read_safetensors(self.folder / f"{path}.safetensors")

    def network(self, name, weights="weights"):
        return KINDS[name](self.config(name), Weights(self.load(f"{name}/{weights}")))

    def compare(self, name, got, expected, tolerance=TOLERANCE):
        error = ((got - expected).abs().max() / expected.abs().max()).item()
        self.failed |= not error <= tolerance
        print(f"{'ok    ' if error <= tolerance else 'FAILED'} {name}: {error:.1e} (limit {tolerance:.0e})")

    def run(self):
        networks = {name: self.network(name) for name in ("dit", "vae", "clip", "umt5")}
        networks["wav2vec2"] = self.network("wav2vec2", "weights_checkpoint_names")
        io = self.load("vae/io")
        for case in (key[:-7] for key in io if key.endswith(".latent")):
            if case.startswith("enc"):
                self.compare(f"vae {case}", networks["vae"].encode(io[f"{case}.video"]), io[f"{case}.latent"])
            else:
                self.compare(f"vae {case}", networks["vae"].decode(io[f"{case}.latent"]), io[f"{case}.video"])
        io = self.load("clip/io")
        for case in (key[:-4] for key in io if key.endswith(".out")):
            self.compare(f"clip {case}", networks["clip"](io[f"{case}.video"][0]), io[f"{case}.out"])
        io = self.load("wav2vec2/io")
        for case in (key[:-4] for key in io if key.endswith(".wav")):
            self.compare(f"wav2vec2 {case}", networks["wav2vec2"](io[f"{case}.wav"]), io[f"{case}.embedding"])
        io = self.load("umt5/io")
        for case in (key[:-4] for key in io if key.endswith(".ids")):
            for i, length in enumerate(io[f"{case}.lens"].tolist()):
                got = networks["umt5"](io[f"{case}.ids"][i, :length])
                self.compare(f"umt5 {case} {i}", got, io[f"{case}.context_{i}"])
        io, dit = self.load("dit/single"), networks["dit"]
        context = dit.encode_context(io["context"], io["clip"])
        for case in (key[:-2] for key in io if key.endswith(".t")):
            audio = dit.encode_audio(io.get(f"{case}.audio", io["audio"]))
            got = dit.run(dit.embed(io["latent"], io["y"][0], io[f"{case}.t"].item()), context, audio)
            self.compare(f"dit {case}", got, io[f"{case}.out"])
        io, config = self.load("image/color"), json.loads((self.folder / "image/config.json").read_text())
        # The reference's value of a frame of one colour is the rounding of numpy's sums; it is left out.
        frames = [f for f in range(io["video"].shape[2]) if f != config["files"]["color.safetensors"]["flat_frame"]]
        for name in (key for key in io if key.startswith("out.strength_")):
            got = match_colors(io["video"][0], io["reference"][0], float(name[13:]))
            self.compare(f"colour {name[4:]}", got[:, frames], io[name][0][:, frames])
        for path in sorted((self.folder / "pipeline").glob("*.json")):
            if path.stem != "config":
                self.video(networks, path.stem, json.loads(path.read_text()))
        return self.failed

    def video(self, networks, name, run):
        """A whole run of the pipeline, where it is of the kind that is timed."""
        io = self.load(f"pipeline/{name}")
        if run["persons"] != 1 or run["use_apg"] or run["use_teacache"] or len(io["in.frames"]) != 1:
            return
        v = {"frames": run["max_frames_num"], "frames_per_window": run["frame_num"], "motion_frames": run["motion_frame"],
             "steps": run["steps"], "shift": run["shift"], "text_guidance": run["text_guide_scale"],
             "audio_guidance": run["audio_guide_scale"], "color_correction": run["color_correction_strength"]}
        got = make_video(networks, v, io["w0.cond_image"][0], io["in.audio_embedding_1"], io["in.context"],
                         io["in.context_null"], lambda w, _: io[f"w{w}.noise"])
        frames, stride = v["frames_per_window"], v["frames_per_window"] - v["motion_frames"]
        bounds = [0, *range(frames, got.shape[1], stride), got.shape[1]]
        for w, (start, end) in enumerate(zip(bounds, bounds[1:])):
            tolerance = WINDOW_TOLERANCES[min(w, 2)]
            self.compare(f"video {name} window {w}", got[:, start:end], io["out.video"][:, start:end], tolerance)


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("description", nargs="?", help="file of `handler bench --describe`; standard input without")
    args.add_argument("--stage", action="append", help="only this stage; may be repeated")
    args.add_argument("--runs", type=int, default=5)
    args.add_argument("--conv2d", action="store_true", help="3D convolutions as sums of 2D ones, unlike the reference")
    args.add_argument("--check", metavar="GOLDENS", help="compare with the reference's outputs instead")
    args = args.parse_args()
    torch.set_grad_enabled(False)
    peer_networks.CONV3D_BY_CONV2D = args.conv2d
    if args.check:
        return int(Check(args.check).run())
    text = pathlib.Path(args.description).read_text() if args.description else sys.stdin.read()
    description = json.loads(text)
    torch.set_num_threads(description["threads"])
    torch.set_default_device(description["device"])
    for stage in description["stages"]:
        if args.stage and stage["name"] not in args.stage:
            continue
        work = prepare(stage)
        if work is not None:
            times = measure(work, args.runs)
            print(json.dumps({"stage": stage["name"], "median_ms": round(statistics.median(times), 4),
                              "best_ms": round(min(times), 4), "runs": args.runs}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
