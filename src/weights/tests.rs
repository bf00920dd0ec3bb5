use super::*;

const NONE: [&str; 0] = [];

fn save(tensors: &[(&str, Tensor)]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let tensors: HashMap<_, _> = tensors.iter().map(|(name, t)| (name.to_string(), t.clone())).collect();
    candle_core::safetensors::save(&tensors, file.path()).unwrap();
    file
}

fn values(len: usize, dtype: DType) -> Tensor {
    let values: Vec<f32> = (0..len).map(|i| (i % 199) as f32 * 0.37 - 30.0).collect();
    Tensor::from_vec(values, len, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let flat = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    flat.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn files_give_what_candle_reads_in_every_dtype() {
    let len = convert::BLOCK + 17;
    for stored in [DType::F64, DType::F32, DType::BF16, DType::F16, DType::F8E4M3] {
        let file = save(&[("x", values(5, stored)), ("y", values(len, stored))]);
        for asked in [DType::F32, DType::BF16, DType::F16] {
            let weights = Weights::open(&[file.path()]).unwrap();
            let y = weights.var_builder(asked, &Device::Cpu).get(len, "y").unwrap();
            assert_eq!(y.dtype(), asked);
            let expected = values(len, stored).to_dtype(DType::F32).unwrap().to_dtype(asked).unwrap();
            assert_eq!(bits(&y), bits(&expected), "{stored:?} as {asked:?}");
        }
    }
}

#[test]
fn shards_are_one_and_a_name_in_two_of_them_is_refused() {
    let (a, b) = (save(&[("a", values(3, DType::F32))]), save(&[("b", values(4, DType::F32))]));
    let weights = Weights::open(&[a.path(), b.path()]).unwrap();
    assert_eq!(weights.names(), ["a", "b"]);
    let vb = weights.var_builder(DType::F32, &Device::Cpu);
    assert!(vb.get(3, "a").is_ok() && vb.get(4, "b").is_ok());
    weights.finish(&NONE).unwrap();

    let again = save(&[("a", values(3, DType::F32))]);
    let error = Weights::open(&[a.path(), again.path()]).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelCorrupt);
    for part in ["`a`", a.path().to_str().unwrap(), again.path().to_str().unwrap()] {
        assert!(error.to_string().contains(part), "{error}, expected {part}");
    }
}

#[test]
fn a_missing_or_misshapen_tensor_is_named_with_its_kind() {
    let weights = Weights::from_tensors(HashMap::from([("a.w".to_owned(), values(6, DType::F32))]));
    for (shape, name, expected) in [((2, 3), "w", "[6], expected [2, 3]"), ((2, 3), "v", "`a.v` is missing")]
    {
        let build = |vb: VarBuilder<'static>| vb.pp("a").get(shape, name);
        let error = weights.load(DType::F32, &Device::Cpu, &NONE, build).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ModelCorrupt);
        assert!(error.to_string().contains(expected), "{error}, expected {expected}");
    }
    let build =
        |_: VarBuilder<'static>| -> candle_core::Result<()> { candle_core::bail!("heads do not divide") };
    let error = weights.load(DType::F32, &Device::Cpu, &["*"], build).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Inference);
    assert!(error.to_string().starts_with("heads do not divide"), "{error}");
}

#[test]
fn tensors_that_nothing_asked_for_are_named_unless_a_pattern_allows_them() {
    let tensors = (0..14).map(|i| (format!("extra.{i:02}"), values(1, DType::F32)));
    let weights =
        Weights::from_tensors(tensors.chain([("used".to_owned(), values(2, DType::F32))]).collect());
    let build = |vb: VarBuilder<'static>| vb.get(2, "used");
    let error = weights.load(DType::F32, &Device::Cpu, &["other.*"], build).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelCorrupt);
    let message = error.to_string();
    assert!(message.contains("14 tensors") && message.contains("`extra.09` and 4 more"), "{message}");
    weights.load(DType::F32, &Device::Cpu, &["extra.*"], build).unwrap();
}

#[test]
fn a_file_that_shrinks_while_it_is_open_is_an_error_with_the_tensor() {
    let file = save(&[("x", values(1000, DType::F32))]);
    let weights = Weights::open(&[file.path()]).unwrap();
    std::fs::OpenOptions::new().write(true).open(file.path()).unwrap().set_len(500).unwrap();
    let error = weights.load(DType::F32, &Device::Cpu, &NONE, |vb| vb.get(1000, "x")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelCorrupt);
    assert!(error.to_string().contains("`x` cannot be read"), "{error}");
}

#[test]
fn random_weights_do_not_depend_on_order_threads_or_other_tensors() {
    let len = 3 * convert::BLOCK + 5;
    let get = |names: &[&str], threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let vb = Weights::random(42).var_builder(DType::F32, &Device::Cpu);
            names
                .iter()
                .map(|name| (name.to_string(), bits(&vb.get(len, name).unwrap())))
                .collect::<HashMap<_, _>>()
        })
    };
    let first = get(&["a.weight", "b.weight"], 1);
    assert!(first == get(&["b.weight", "a.weight"], 3));
    assert!(first["a.weight"] != first["b.weight"]);
    assert!(
        first["a.weight"]
            != bits(&Weights::random(43).var_builder(DType::F32, &Device::Cpu).get(len, "a.weight").unwrap())
    );
}

#[test]
fn random_weights_have_one_spelling_of_each_name_and_need_a_shape() {
    let vb = Weights::random(1).var_builder(DType::F32, &Device::Cpu);
    assert!(vb.contains_tensor("encoder.pos_conv_embed.conv.weight_g"));
    assert!(!vb.contains_tensor("encoder.pos_conv_embed.conv.parametrizations.weight.original0"));
    assert!(!vb.pp("wav2vec2").contains_tensor("encoder.pos_conv_embed.conv.weight_g"));
    assert!(vb.get_unchecked("x").is_err());
    assert!(vb.to_dtype(DType::I64).get(3, "x").unwrap_err().to_string().contains("i64"));
}

#[test]
fn quantised_weights_come_under_the_name_of_the_original() {
    let codes = Tensor::from_vec(vec![-128i64, 0, 127, 1, 2, 3], (2, 3), &Device::Cpu).unwrap();
    let scale = Tensor::from_vec(vec![0.5f32, 2.0], (2, 1), &Device::Cpu).unwrap();
    let one = Tensor::ones((), DType::F32, &Device::Cpu).unwrap();
    let tensors = HashMap::from([
        ("m.weight._data".to_owned(), codes),
        ("m.weight._scale".to_owned(), scale),
        ("m.input_scale".to_owned(), one.clone()),
        ("m.output_scale".to_owned(), one.clone()),
    ]);
    let weights = Weights::from_tensors(tensors.clone());
    let build = |vb: VarBuilder<'static>| vb.pp("m").get((2, 3), "weight");
    let weight = weights.load(DType::F32, &Device::Cpu, &NONE, build).unwrap();
    assert_eq!(weight.to_vec2::<f32>().unwrap(), [[-64.0, 0.0, 63.5], [2.0, 4.0, 6.0]]);

    let map = |module: &str| {
        quant::Map::parse(&format!(r#"{{"{module}": {{"weights": "qint8", "activations": "none"}}}}"#))
            .unwrap()
    };
    weights.check_quantized(&map("m")).unwrap();
    let error = weights.check_quantized(&map("n")).unwrap_err().to_string();
    assert!(error.contains("`m`, `n`"), "{error}");

    // Activation scales of a module that is not quantised are nothing that anybody knows.
    let mut stray = tensors.clone();
    stray.insert("n.input_scale".to_owned(), one);
    let error = Weights::from_tensors(stray).load(DType::F32, &Device::Cpu, &NONE, build).unwrap_err();
    assert!(error.to_string().contains("`n.input_scale`"), "{error}");

    let mut missing = tensors.clone();
    missing.remove("m.weight._scale");
    let error = Weights::from_tensors(missing).load(DType::F32, &Device::Cpu, &NONE, build).unwrap_err();
    assert!(error.to_string().contains("`m.weight._scale` is missing"), "{error}");

    let mut misshapen = tensors;
    misshapen.insert("m.weight._scale".to_owned(), Tensor::ones(2, DType::F32, &Device::Cpu).unwrap());
    let error = Weights::from_tensors(misshapen).load(DType::F32, &Device::Cpu, &NONE, build).unwrap_err();
    assert!(error.to_string().contains("expected [2, 1]"), "{error}");
}
