//! Checks what one value of the registry alone does not show. An error names the line of what is in the way.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use toml::Spanned;

use super::parse::{Checked, Failure, Overrides, RawModel, RawNetwork};
use super::source::{FileSpec, RawSource, RepoFiles};
use super::{ModelSpec, PRESETS};

/// The numbers of persons that a model makes videos of.
const SPEAKERS: [usize; 2] = [1, 2];

/// Checks a completed model; `raw` is what it says itself, at `span`.
pub(super) fn check(model: &ModelSpec, raw: &RawModel, span: Range<usize>) -> Checked<()> {
    let fail = |message: String| Failure::new(span.clone(), format!("model `{}`: {message}", model.name));
    let (dit, audio) = (&model.dit.config, &model.audio_encoder.config);
    let joints = [
        ("dit.text_dim", dit.text_dim, "text_encoder.dim", model.text_encoder.config.dim),
        ("dit.clip_dim", dit.clip_dim, "image_encoder.vision_dim", model.image_encoder.config.vision_dim),
        ("dit.audio_channels", dit.audio_channels, "audio_encoder.hidden_size", audio.hidden_size),
        ("dit.audio_blocks", dit.audio_blocks, "audio_encoder.num_hidden_layers", audio.num_hidden_layers),
        ("dit.out_dim", dit.out_dim, "vae.z_dim", model.vae.config.z_dim),
    ];
    for (left, value, right, other) in joints {
        if value != other {
            return Err(fail(format!("`{left}` is {value} and `{right}` is {other}, expected the same")));
        }
    }
    raw.dit.as_ref().map_or(Ok(()), |network| check_network("dit", network))?;
    raw.vae.as_ref().map_or(Ok(()), |network| check_network("vae", network))?;
    raw.text_encoder.as_ref().map_or(Ok(()), |network| check_network("text_encoder", network))?;
    raw.image_encoder.as_ref().map_or(Ok(()), |network| check_network("image_encoder", network))?;
    raw.audio_encoder.as_ref().map_or(Ok(()), |network| check_network("audio_encoder", network))?;
    if let Some(tokenizer) = &raw.tokenizer {
        check_single("tokenizer", tokenizer.entries())?;
    }
    for (name, lora) in raw.loras.iter().flatten() {
        check_single(&format!("loras.{name}"), std::slice::from_ref(&lora.source))?;
    }
    for (name, preset) in [("generation", None)].into_iter().chain(PRESETS.map(|name| (name, Some(name)))) {
        let settings = match preset {
            Some(preset) => model.presets[preset].clone().or(&model.defaults),
            None => model.defaults.clone(),
        };
        check_settings(name, &settings, model)?;
    }
    Ok(())
}

fn check_settings(name: &str, settings: &Overrides, model: &ModelSpec) -> Checked<()> {
    check_windows(settings)?;
    if let Some(loras) = &settings.loras {
        let fail = |lora: &str, why: &str| {
            let message = format!("`{name}` of model `{}` uses the LoRA `{lora}`, {why}", model.name);
            Err(Failure::new(loras.span(), message))
        };
        let names = loras.get_ref();
        if let Some(lora) = names.iter().find(|lora| !model.loras.contains_key(*lora)) {
            return fail(lora, "which is not in `loras`");
        }
        if let Some(lora) = names.iter().enumerate().find(|(i, lora)| names[..*i].contains(lora)) {
            return fail(lora.1, "twice");
        }
        if let (Some(lora), false) = (names.first(), model.dit.quantization.is_empty()) {
            return fail(lora, "which cannot be merged into a quantised network");
        }
    }
    let Some(threshold) = &settings.teacache else { return Ok(()) };
    let value = *threshold.get_ref();
    if !(0.0..1000.0).contains(&value) {
        let message = format!("`teacache` is {value}, expected a number of at least 0 and below 1000");
        return Err(Failure::new(threshold.span(), message));
    }
    match model.sizes.iter().find(|size| value > 0.0 && size.teacache_coefficients.is_none()) {
        Some(size) => {
            let message = format!("`{name}` uses `teacache`, but size `{}` has no coefficients", size.name);
            Err(Failure::new(threshold.span(), message))
        }
        None => Ok(()),
    }
}

fn check_windows(settings: &Overrides) -> Checked<()> {
    for (name, value) in
        [("frames_per_window", &settings.frames_per_window), ("motion_frames", &settings.motion_frames)]
    {
        if let Some(value) = value.as_ref().filter(|value| value.get_ref() % 4 != 1) {
            let (span, value) = (value.span(), value.get_ref());
            return Err(Failure::new(span, format!("`{name}` is {value}, expected 4n+1 (for example 81)")));
        }
    }
    let (Some(frames), Some(motion)) = (&settings.frames_per_window, &settings.motion_frames) else {
        return Ok(());
    };
    if motion.get_ref() >= frames.get_ref() {
        let message = format!(
            "`motion_frames` is {}, expected less than `frames_per_window`, {}",
            motion.get_ref(),
            frames.get_ref()
        );
        return Err(Failure::new(motion.span(), message));
    }
    Ok(())
}

/// Checks where one network's weights come from.
fn check_network<C>(name: &str, network: &RawNetwork<C>) -> Checked<()> {
    let maps = &network.quantization;
    check_speakers(name, network.source.entries())?;
    check_speakers(&format!("{name}.quantization"), maps)?;
    let random = matches!(network.source, RawSource::Random(_));
    if let (true, Some(map)) = (random, maps.first()) {
        let message = format!("`{name}` has random weights and a `quantization`, expected one of them");
        return Err(Failure::new(map.span(), message));
    }
    for speakers in SPEAKERS {
        let mut seen = BTreeSet::new();
        let wanted = |entry: &&Spanned<RepoFiles>| entry.get_ref().is_for(speakers);
        for entry in network.source.entries().iter().chain(maps).filter(wanted) {
            for file in &entry.get_ref().files {
                if !seen.insert((&entry.get_ref().repo, &file.path)) {
                    let message = format!("`{name}` lists the file `{}` twice", file.path);
                    return Err(Failure::new(entry.span(), message));
                }
            }
        }
        let count = maps.iter().filter(wanted).map(|entry| entry.get_ref().files.len()).sum::<usize>();
        if let (Some(map), true) = (maps.first(), count != 1) {
            let message =
                format!("`{name}.quantization` has {count} files for {speakers} speaker(s), expected one");
            return Err(Failure::new(map.span(), message));
        }
    }
    let Some(unused) = &network.unused else { return Ok(()) };
    let fail = |message: String| Err(Failure::new(unused.span(), format!("`{name}.unused` {message}")));
    let patterns = unused.get_ref();
    if random && !patterns.is_empty() {
        return fail("lists tensors of files, and the weights are random".to_owned());
    }
    if let Some(pattern) = patterns.iter().find(|pattern| pattern.trim_matches('*').is_empty()) {
        return fail(format!("has {pattern:?}, which would pass over every tensor"));
    }
    match patterns.iter().enumerate().find(|(i, pattern)| patterns[..*i].contains(pattern)) {
        Some((_, pattern)) => fail(format!("has {pattern:?} twice")),
        None => Ok(()),
    }
}

/// Files for one number of speakers ask for files for the other one, too.
fn check_speakers(name: &str, entries: &[Spanned<RepoFiles>]) -> Checked<()> {
    let Some(named) = entries.iter().find(|entry| entry.get_ref().speakers.is_some()) else { return Ok(()) };
    let has = |n| entries.iter().any(|entry| entry.get_ref().speakers == Some(n));
    match SPEAKERS.into_iter().find(|n| !has(*n)) {
        Some(missing) => {
            let message = format!("`{name}` has files with `speakers`, but none with `speakers = {missing}`");
            Err(Failure::new(named.span(), message))
        }
        None => Ok(()),
    }
}

/// What is read as one file is one file.
fn check_single(name: &str, entries: &[Spanned<RepoFiles>]) -> Checked<()> {
    let count: usize = entries.iter().map(|entry| entry.get_ref().files.len()).sum();
    match entries.iter().find(|entry| count > 1 || entry.get_ref().speakers.is_some()) {
        Some(entry) => {
            let message = format!("`{name}` is one file for any number of speakers, and here are more");
            Err(Failure::new(entry.span(), message))
        }
        None => Ok(()),
    }
}

/// Files lie by repository and path, so that one repository has one revision, and one file one size and hash, in all
/// models together.
pub(super) fn check_repositories<'a>(models: impl Iterator<Item = &'a RawModel>) -> Checked<()> {
    let mut entries: Vec<_> = models.flat_map(entries).collect();
    entries.sort_by_key(|entry| entry.span().start);
    let mut repos: BTreeMap<&str, &RepoFiles> = BTreeMap::new();
    let mut files: BTreeMap<(&str, &str), &FileSpec> = BTreeMap::new();
    for entry in entries {
        let repo = entry.get_ref();
        let known = repos.entry(&repo.repo).or_insert(repo);
        if (&known.revision, &known.branch) != (&repo.revision, &repo.branch) {
            let message = format!("`{}` is listed with another revision or branch above", repo.repo);
            return Err(Failure::new(entry.span(), message));
        }
        for file in &repo.files {
            let known = files.entry((&repo.repo, &file.path)).or_insert(file);
            if **known != *file {
                let message = format!("`{}` is listed with another size or hash above", file.path);
                return Err(Failure::new(entry.span(), message));
            }
        }
    }
    Ok(())
}

/// Everything that a model lists itself.
fn entries(model: &RawModel) -> Vec<&Spanned<RepoFiles>> {
    let mut all: Vec<&Spanned<RepoFiles>> = Vec::new();
    macro_rules! add {
        ($($network:ident)*) => {$(
            if let Some(network) = &model.$network {
                all.extend(network.source.entries().iter().chain(&network.quantization));
            }
        )*};
    }
    add!(dit vae text_encoder image_encoder audio_encoder);
    all.extend(model.tokenizer.iter().flat_map(|tokenizer| tokenizer.entries()));
    all.extend(model.loras.iter().flatten().map(|(_, lora)| &lora.source));
    all
}
