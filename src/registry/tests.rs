use super::*;

/// A model that is complete and small: `tiny` of the built-in registry alone.
fn tiny_text() -> &'static str {
    &BUILT_IN[BUILT_IN.find("[models.tiny]").unwrap()..]
}

/// Reads `text` where no variable is set.
fn parse(text: &str) -> Result<Registry> {
    Registry::parse(text, "models.toml", &|_| None)
}

fn error(text: &str) -> String {
    let error = parse(text).unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::InvalidInput, Some("MODEL_REGISTRY")));
    error.to_string()
}

#[test]
fn the_built_in_registry_is_sound() {
    let registry = Registry::built_in().unwrap();
    assert_eq!(
        registry.names().collect::<Vec<_>>(),
        ["infinitetalk", "infinitetalk-fast", "infinitetalk-fp8", "tiny"]
    );
    for model in registry.models() {
        for size in [None, Some("480p"), Some("720p")] {
            for preset in [None].into_iter().chain(PRESETS.map(Some)) {
                let settings = model.generation(size, preset).unwrap();
                assert!(settings.motion_frames < settings.frames_per_window);
                assert!(!settings.prompt.is_empty() && !settings.negative_prompt.is_empty());
                assert!(settings.loras.iter().all(|name| model.loras.contains_key(name)));
            }
        }
    }
}

#[test]
fn infinitetalk_has_the_settings_of_the_reference() {
    let registry = Registry::built_in().unwrap();
    let model = registry.model("infinitetalk").unwrap();
    let settings = model.generation(None, None).unwrap();
    assert_eq!((settings.steps, settings.shift, settings.teacache), (40, 7.0, None));
    assert_eq!((settings.text_guidance, settings.audio_guidance, settings.color_correction), (5.0, 4.0, 1.0));
    assert_eq!((settings.frames_per_window, settings.motion_frames), (81, 9));
    assert!(
        settings.negative_prompt.starts_with("bright tones")
            && settings.negative_prompt.ends_with("backwards")
    );
    assert_eq!(model.generation(Some("720p"), None).unwrap().shift, 11.0);

    let cached = model.generation(Some("720p"), Some("balanced")).unwrap().teacache.unwrap();
    assert_eq!((cached.threshold, cached.coefficients[0]), (0.2, 8.107_054_60e3));
    assert_eq!(model.size(Some("480p")).unwrap().buckets, Buckets::infinitetalk_480());
    assert_eq!(model.size(Some("720p")).unwrap().buckets, Buckets::infinitetalk_720());
}

#[test]
fn one_and_two_speakers_differ_in_the_adapter_only() {
    let registry = Registry::built_in().unwrap();
    let model = registry.model("infinitetalk").unwrap();
    let paths = |speakers| {
        let files = model.dit.source.files(speakers).flat_map(|files| &files.files);
        files.map(|file| file.path.clone()).collect::<Vec<_>>()
    };
    let (one, two) = (paths(1), paths(2));
    assert_eq!((one.len(), &one[..7]), (8, &two[..7]));
    assert_eq!(
        (one[7].as_str(), two[7].as_str()),
        ("single/infinitetalk.safetensors", "multi/infinitetalk.safetensors")
    );
    assert_eq!(model.audio_encoder.source.files(1).next().unwrap().branch, "refs/pr/1");
}

#[test]
fn a_model_extends_another() {
    let registry = Registry::built_in().unwrap();
    let (base, fast) =
        (registry.model("infinitetalk").unwrap(), registry.model("infinitetalk-fast").unwrap());
    assert_eq!((&base.dit.source, &base.loras), (&fast.dit.source, &fast.loras));
    let settings = fast.generation(Some("720p"), None).unwrap();
    assert_eq!((settings.steps, settings.shift, settings.frames_per_window), (4, 2.0, 81));
    assert_eq!(settings.loras, ["lightx2v"]);
    assert_eq!(fast.generation(None, Some("quality")).unwrap().loras, ["fusionx"]);
}

#[test]
fn random_weights_need_no_file() {
    let registry = Registry::built_in().unwrap();
    let model = registry.model("infinitetalk-fast").unwrap().clone().with_random_weights(7);
    assert_eq!((&model.dit.source, &model.vae.source), (&Source::Random(7), &Source::Random(7)));
    assert_eq!(
        (&model.text_encoder.source, &model.image_encoder.source),
        (&Source::Random(7), &Source::Random(7))
    );
    assert_eq!(
        (&model.audio_encoder.source, &model.tokenizer),
        (&Source::Random(7), &TokenizerSource::Bytes)
    );
    for preset in [None].into_iter().chain(PRESETS.map(Some)) {
        assert!(model.generation(None, preset).unwrap().loras.is_empty());
    }
    assert_eq!(model.dit.config, wan::Config::infinitetalk_14b());
}

#[test]
fn unknown_names_are_errors_that_list_the_known_ones() {
    let registry = Registry::built_in().unwrap();
    let missing = registry.model("huge").unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::ModelNotFound);
    assert!(
        missing.to_string().contains("infinitetalk, infinitetalk-fast, infinitetalk-fp8, tiny"),
        "{missing}"
    );
    let model = registry.model("tiny").unwrap();
    for error in
        [model.generation(Some("8k"), None), model.generation(None, Some("best"))].map(Result::unwrap_err)
    {
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("expected one"), "{error}");
    }
}

#[test]
fn the_cpu_computes_in_f32_whatever_the_registry_says() {
    let registry = Registry::built_in().unwrap();
    assert_eq!(registry.model("tiny").unwrap().dit.dtype(&Device::Cpu), DType::F32);
}

#[test]
fn mistakes_are_errors_that_name_the_key_and_the_line() {
    let text = tiny_text();
    parse(text).unwrap();
    // What to replace (first occurrence), by what, and what the message must name.
    let cases = [
        ("tokenizer = \"bytes\"", "tokeniser = \"bytes\"", "unknown field `tokeniser`"),
        ("num_heads = 4", "heads = 4", "unknown field `heads`"),
        ("dim_mult = [1, 2, 4, 4]", "dim_mult = [1, 2, 4, 4]\nlayers = 3", "unknown field `layers`"),
        ("steps = 4", "stepz = 4", "unknown field `stepz`"),
        ("steps = 4", "steps = 0", "is 0, expected 1 to 1000"),
        ("steps = 4", "steps = \"4\"", "invalid type: string \"4\""),
        ("frames_per_window = 49", "frames_per_window = 48", "`frames_per_window` is 48, expected 4n+1"),
        ("motion_frames = 9", "motion_frames = 10", "`motion_frames` is 10, expected 4n+1"),
        ("motion_frames = 9", "motion_frames = 49", "`motion_frames` is 49, expected less than"),
        ("color_correction = 1.0", "color_correction = 1.5", "is 1.5, expected a number from 0 to 1"),
        ("text_guidance = 5.0", "text_guidance = -1.0", "is -1, expected a number of at least 0"),
        ("text_guidance = 5.0", "text_guidance = nan", "is NaN, expected"),
        ("shift = 7.0", "shift = 0.0", "is 0, expected a number above 0"),
        ("source = \"random:42\"", "source = \"random:x\"", "\"random:x\", expected \"random:<seed>\""),
        ("source = \"random:42\"", "source = []", "there is no file"),
        ("dtype = \"bf16\"", "dtype = \"int4\"", "`dtype` is \"int4\""),
        ("default_size = \"480p\"", "default_size = \"360p\"", "`default_size` is \"360p\""),
        ("[models.tiny.sizes.720p]", "[models.tiny.sizes.360p]", "there is no size `360p`"),
        ("[96, 192]", "[96, 190]", "96x190, expected multiples of 16"),
        ("fast = {", "quick = {", "there is no preset `quick`"),
        ("quality = { steps = 8 }", "", "the preset `quality` is missing"),
        ("quality = { steps = 8 }", "quality = { loras = [\"x\"] }", "uses the LoRA `x`"),
        ("quality = { steps = 8 }", "quality = { teacache = 0.1 }", "size `480p` has no coefficients"),
        ("audio_channels = 64", "audio_channels = 65", "`dit.audio_channels` is 65"),
        ("tokenizer = \"bytes\"", "extends = \"big\"", "`extends` names `big`"),
        ("[models.tiny.generation]", "[models.tiny.generation", "line"),
    ];
    for (from, to, expected) in cases {
        assert!(text.contains(from), "{from}");
        let message = error(&text.replacen(from, to, 1));
        assert!(message.contains(expected), "{message}\nexpected {expected}");
    }
    // A mistake on a line of its own is reported at that line.
    for (from, to) in [
        ("steps = 4", "stepz = 4"),
        ("num_heads = 4", "num_heads = -4"),
        ("num_heads = 4", "heads = 4"),
        ("motion_frames = 9", "motion_frames = 8"),
    ] {
        let line = text[..text.find(from).unwrap()].lines().count() + 1;
        let message = error(&text.replacen(from, to, 1));
        assert!(
            message.starts_with(&format!("models.toml line {line}: ")),
            "{message}\nexpected line {line}"
        );
        assert!(message.ends_with(&format!("in `{to}`")), "{message}");
    }
}

#[test]
fn files_are_pinned_or_learned_and_stay_inside_of_their_folder() {
    let source = |repo: &str, revision: &str, path: &str, rest: &str| {
        let files = format!(
            "source = [{{ repo = {repo:?}, revision = {revision:?}, files = [{{ path = {path:?}, size = 5, sha256 = \"learn\" }}] {rest} }}]"
        );
        tiny_text().replacen("source = \"random:42\"", &files, 1)
    };
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let registry = parse(&source("a/b", commit, "c/d.safetensors", "")).unwrap();
    let files = registry.model("tiny").unwrap().dit.source.files(1).next().unwrap().clone();
    assert_eq!(files.revision.known().unwrap(), commit);
    assert_eq!((files.files[0].size.known(), files.files[0].sha256.known()), (Some(&5), None));
    assert_eq!((files.branch.as_str(), files.speakers), ("main", None));
    for (text, expected) in [
        (
            source("a/b", "main", "c", ""),
            "`revision` is \"main\", expected 40 hexadecimal digits or \"learn\"",
        ),
        (source("a", commit, "c", ""), "`repo` is \"a\""),
        (source("a/../b", commit, "c", ""), "`repo` is \"a/../b\""),
        (source("a/b", commit, "../c", ""), "`path` is \"../c\""),
        (source("a/b", commit, "/c", ""), "`path` is \"/c\""),
        (source("a/b", commit, "c", ", speakers = 3"), "`speakers` is 3"),
        (source("a/b", commit, "c", ", tag = 1"), "unknown field `tag`"),
    ] {
        let message = error(&text);
        assert!(message.contains(expected), "{message}\nexpected {expected}");
    }
}

#[test]
fn a_registry_file_takes_the_place_of_the_one_built_in() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), tiny_text()).unwrap();
    assert_eq!(Registry::open(file.path(), &|_| None).unwrap().names().collect::<Vec<_>>(), ["tiny"]);
    let error = Registry::open("no/models.toml", &|_| None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelNotFound);
    assert!(error.to_string().contains("no/models.toml"), "{error}");
}

#[test]
fn a_quantised_model_lists_its_maps_and_has_no_lora() {
    let registry = Registry::built_in().unwrap();
    let model = registry.model("infinitetalk-fp8").unwrap();
    let paths = |speakers| {
        let files = model.files(speakers, &[]).flat_map(|files| &files.files);
        files.map(|file| file.path.as_str()).filter(|path| path.starts_with("quant")).collect::<Vec<_>>()
    };
    let (t5, map) = ("quant_models/t5_fp8.safetensors", "quant_models/t5_map_fp8.json");
    for (speakers, name) in [(1, "single"), (2, "multi")] {
        let dit = ["safetensors", "json"].map(|end| format!("quant_models/infinitetalk_{name}_fp8.{end}"));
        assert_eq!(paths(speakers), [t5, map, &dit[0], &dit[1]]);
        assert_eq!(model.dit.quantization(speakers).unwrap().files[0].path, dit[1]);
    }
    assert!(model.vae.quantization(1).is_none() && model.loras.is_empty());
    assert!(model.clone().with_random_weights(1).files(1, &[]).next().is_none());
}

/// `infinitetalk` and the two models that extend it, with the first `from` replaced by `to`.
fn changed(from: &str, to: &str) -> String {
    assert!(BUILT_IN.contains(from), "{from}");
    BUILT_IN.replacen(from, to, 1)
}

#[test]
fn combinations_that_cannot_work_are_errors_that_name_the_line() {
    // What to replace (first occurrence) by what, the line that is named, and what the message must say.
    let cases = [
        ("unused = [\"textual.*\"", "unused = [\"*\"", "unused = [\"*\"", "pass over every tensor"),
        ("unused = [\"textual.*\"", "unused = [\"log_scale\"", "unused = [", "\"log_scale\" twice"),
        (
            "speakers = 2\n",
            "speakers = 1\n",
            "[[models.infinitetalk.dit.source]]",
            "none with `speakers = 2`",
        ),
        ("speakers = 2\n", "", "[[models.infinitetalk.dit.source]]", "none with `speakers = 2`"),
        ("\"single/infinitetalk", "\"multi/infinitetalk", "", "with another size or hash"),
        ("-00002-of", "-00001-of", "[[models.infinitetalk.dit.source]]", "with another size or hash"),
        (
            "-00006-of",
            "-00005-of",
            "[[models.infinitetalk.dit.source]]",
            "-00005-of-00007.safetensors` twice",
        ),
        (
            "loras = {}\n",
            "loras = { x = { source = \"hf://a/b/c\", scale = 1.0 } }\ngeneration = { loras = [\"x\"] }\n",
            "generation = { loras",
            "cannot be merged into a quantised network",
        ),
        (
            "loras = [\"fusionx\"] }",
            "loras = [\"y\"] }",
            "quality = { steps = 8",
            "`y`, which is not in `loras`",
        ),
        ("loras = [\"lightx2v\"]", "loras = [\"lightx2v\", \"lightx2v\"]", "loras = [", "`lightx2v`, twice"),
        ("branch = \"refs/pr/1\"", "branch = \"../x\"", "branch", "expected the name of a branch"),
        ("prepared = \"prepared\"", "prepared = \"../x\"", "prepared", "`prepared` is \"../x\""),
        (
            "source = [\"hf://MeiGen-AI/InfiniteTalk/",
            "source = [\"hf://MeiGen-AI/InfiniteTalk@main/",
            "source = [\"hf://",
            "is \"main\", expected 40 hexadecimal digits",
        ),
        (
            "source = [\"hf://MeiGen-AI/InfiniteTalk/",
            "source = [\"hf://MeiGen-AI/../",
            "source = [",
            "expected hf://",
        ),
        (
            "quantization = [\"hf://",
            "quantization = [\"http://",
            "quantization = [",
            "expected a table of `repo`",
        ),
        (
            "quantization = [",
            "quantization = [\"hf://MeiGen-AI/InfiniteTalk/x.json\", ",
            "quantization = [",
            "has 2 files for 1 speaker(s)",
        ),
    ];
    for (from, to, line, expected) in cases {
        let message = error(&changed(from, to));
        assert!(message.contains(expected), "{message}\nexpected {expected}");
        assert!(message.rsplit(", in `").next().unwrap().starts_with(line), "{message}\nexpected {line}");
    }
    let message = error(&changed("revision = \"learn\"", &format!("revision = \"{}\"", "0".repeat(40))));
    assert!(message.contains("listed with another revision"), "{message}");
    let random =
        tiny_text().replacen("source = \"random:42\"", "source = \"random:42\"\nunused = [\"a\"]", 1);
    assert!(error(&random).contains("the weights are random"));
}

#[test]
fn variables_are_looked_up_and_prose_is_left_alone() {
    let text = tiny_text()
        .replacen(
            "tokenizer = \"bytes\"",
            "tokenizer = [\"hf://$OWNER/${NAME}_x/t.json\"]\nprepared = \"$DIR/p\"",
            1,
        )
        .replacen("A person is talking to the camera.", "$5 or $OWNER", 1);
    let lookup = |name: &str| match name {
        "OWNER" => Some("o".to_owned()),
        "NAME" => Some("n".to_owned()),
        "DIR" => Some("/d".to_owned()),
        "EMPTY" => Some(String::new()),
        _ => None,
    };
    let registry = Registry::parse(&text, "models.toml", &lookup).unwrap();
    let model = registry.model("tiny").unwrap();
    assert_eq!(model.files(1, &[]).next().unwrap().repo, "o/n_x");
    assert_eq!(model.prepared, Prepared::Folder("/d/p".into()));
    assert_eq!(model.generation(None, None).unwrap().prompt, "$5 or $OWNER");
    for (written, expected) in [
        ("$MISSING", "`$MISSING` is not set"),
        ("${EMPTY}", "`$EMPTY` is not set"),
        ("${OWNER", "without a name"),
        ("a$", "without a name"),
        ("${a-b}", "without a name"),
    ] {
        let message = Registry::parse(&text.replacen("$OWNER", written, 1), "models.toml", &lookup);
        let message = message.unwrap_err().to_string();
        assert!(message.starts_with("models.toml line 3: ") && message.contains(expected), "{message}");
    }
}

#[test]
fn prepared_files_lie_below_the_storage_or_come_from_a_repository() {
    let storage = ModelStorage::at("/m");
    let registry = Registry::built_in().unwrap();
    let prepared = &registry.model("infinitetalk-fast").unwrap().prepared;
    assert_eq!(prepared.folder(&storage), Path::new("/m/prepared"));
    assert_eq!(prepared.files(&["a".to_owned()]), None);
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let text = changed("prepared = \"prepared\"", &format!("prepared = \"hf://me/mine@{commit}\""));
    let registry = parse(&text).unwrap();
    let prepared = &registry.model("infinitetalk").unwrap().prepared;
    assert_eq!(prepared.folder(&storage), Path::new("/m/me/mine"));
    let files = prepared.files(&["dit-0.safetensors".to_owned()]).unwrap();
    assert_eq!((files.repo.as_str(), files.revision.known().unwrap().as_str()), ("me/mine", commit));
    assert_eq!(files.files[0].path, "dit-0.safetensors");
}
