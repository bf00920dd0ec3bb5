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
fn the_header_may_list_tensors_in_another_order_than_the_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},
        "a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes().chain(1f32.to_le_bytes()).chain(2f32.to_le_bytes()));
    std::fs::write(file.path(), bytes).unwrap();
    let vb = Weights::open(&[file.path()]).unwrap().var_builder(DType::F32, &Device::Cpu);
    assert_eq!(vb.get(1, "a").unwrap().to_vec1::<f32>().unwrap(), [1.0]);
    assert_eq!(vb.get(1, "b").unwrap().to_vec1::<f32>().unwrap(), [2.0]);
}

#[test]
fn a_missing_file_is_not_found() {
    let error = Weights::open(&["no/such.safetensors"]).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelNotFound);
    assert!(error.to_string().contains("no/such.safetensors"));
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

#[test]
fn a_plan_lists_what_is_asked_for_and_reads_nothing() {
    let file =
        save(&[("a", values(6, DType::BF16)), ("b", values(5, DType::F32)), ("c", values(1, DType::F32))]);
    let monitor = Arc::new(LoadMonitor::default());
    let weights = Weights::open(&[file.path()]).unwrap().watched_by(Arc::clone(&monitor));
    let build = |vb: VarBuilder<'static>| {
        vb.get(5, "b")?;
        vb.to_dtype(DType::BF16).get(6, "a")?;
        vb.get(5, "b")
    };
    let plan = weights.plan(DType::F32, &Device::Cpu, &["c"], build).unwrap();
    let tensor =
        |name: &str, len: usize, dtype| PlannedTensor { name: name.into(), shape: len.into(), dtype };
    let expected = [tensor("b", 5, DType::F32), tensor("a", 6, DType::BF16), tensor("b", 5, DType::F32)];
    assert_eq!(plan.tensors, expected);
    assert_eq!((plan.bytes_resident, plan.bytes_to_read), (5 * 4 + 6 * 2, 5 * 4 + 6 * 2));
    let error = weights.plan(DType::F32, &Device::Cpu, &NONE, build).unwrap_err();
    assert!(error.to_string().contains("`c`"), "{error}");
    assert_eq!(monitor.stats(), LoadStats::default());
    weights.load(DType::F32, &Device::Cpu, &["c"], build).unwrap();
    assert!(monitor.bytes_read() >= plan.bytes_to_read);
    assert!(monitor.stats().wall > std::time::Duration::ZERO);
}

#[test]
fn a_tensor_may_be_asked_for_twice_and_in_two_dtypes() {
    let file = save(&[("a", values(1000, DType::F32))]);
    let weights = Weights::open(&[file.path()]).unwrap();
    let build = |vb: VarBuilder<'static>| {
        Ok([vb.get(1000, "a")?, vb.to_dtype(DType::BF16).get(1000, "a")?, vb.get(1000, "a")?])
    };
    let tensors = weights.load(DType::F32, &Device::Cpu, &NONE, build).unwrap();
    for (tensor, dtype) in tensors.iter().zip([DType::F32, DType::BF16, DType::F32]) {
        assert_eq!(tensor.dtype(), dtype);
        assert_eq!(bits(tensor), bits(&values(1000, DType::F32).to_dtype(dtype).unwrap()));
    }
    // A network that asks for something else the second time, as none does.
    let calls = std::cell::Cell::new(0);
    let build = |vb: VarBuilder<'static>| {
        calls.set(calls.get() + 1);
        let dtype = if calls.get() == 1 { DType::F32 } else { DType::F16 };
        vb.to_dtype(dtype).get(1000, "a")
    };
    let tensor = weights.load(DType::F32, &Device::Cpu, &NONE, build).unwrap();
    assert_eq!(bits(&tensor), bits(&values(1000, DType::F16)));
}

#[test]
fn what_does_not_fit_is_found_before_anything_is_read() {
    let file = save(&[("a", values(1000, DType::F32)), ("b", values(4, DType::F32))]);
    let monitor = Arc::new(LoadMonitor::default());
    let weights = Weights::open(&[file.path()]).unwrap().watched_by(Arc::clone(&monitor));
    let load = |unused: &[&str], names: &'static [&'static str]| {
        let build = move |vb: VarBuilder<'static>| {
            names.iter().map(|name| vb.get(1000, name)).collect::<candle_core::Result<Vec<_>>>()
        };
        weights.load(DType::F32, &Device::Cpu, unused, build).unwrap_err().to_string()
    };
    for (message, expected) in [
        (load(&["b"], &["a", "c"]), "`c` is missing"),
        (load(&NONE, &["a", "b"]), "`b` has the shape [4], expected [1000]"),
        (load(&NONE, &["a"]), "1 tensors are not part of the network: `b`"),
    ] {
        assert!(message.contains(expected), "{message}, expected {expected}");
    }
    assert_eq!(monitor.bytes_read(), 0);
}

#[test]
fn a_monitor_ends_a_load_between_two_pieces() {
    let file = save(&[("a", values(12 << 20, DType::F32))]);
    let checks = Arc::new(AtomicUsize::new(0));
    let monitor = LoadMonitor::new({
        let checks = Arc::clone(&checks);
        move || match checks.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
            0 => Ok(()),
            _ => Err(Error::new(ErrorKind::Cancelled, "no longer wanted")),
        }
    });
    let monitor = Arc::new(monitor);
    let weights = Weights::open(&[file.path()]).unwrap().watched_by(Arc::clone(&monitor));
    let error = weights.load(DType::F32, &Device::Cpu, &NONE, |vb| vb.get(12 << 20, "a")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert!(checks.load(std::sync::atomic::Ordering::Relaxed) <= 9);
    assert!(monitor.bytes_read() <= 8 << 20, "{}", monitor.bytes_read());
}

#[test]
fn a_lora_is_merged_piece_by_piece_and_stays_in_its_file() {
    // More than one piece of the base, more than one product of rows, and rows that fill no block.
    let (rows, width, rank) = (1500, 1801, 3);
    let matrix =
        |rows: usize, width: usize, dtype| values(rows * width, dtype).reshape((rows, width)).unwrap();
    let lora = save(&[
        ("m.lora_down.weight", matrix(rank, width, DType::BF16)),
        ("m.lora_up.weight", matrix(rows, rank, DType::BF16)),
        ("m.alpha", Tensor::new(1.5f32, &Device::Cpu).unwrap()),
        ("m.diff", matrix(rows, width, DType::F16)),
    ]);
    let product = |up: &Tensor, down: &Tensor| {
        let (up, down) = (up.to_dtype(DType::F32).unwrap(), down.to_dtype(DType::F32).unwrap());
        ((up.matmul(&down).unwrap() * 0.5).unwrap() * 0.25).unwrap()
    };
    let change = product(&matrix(rows, rank, DType::BF16), &matrix(rank, width, DType::BF16));
    let diff = (matrix(rows, width, DType::F16).to_dtype(DType::F32).unwrap() * 0.25).unwrap();
    let change = (diff + change).unwrap();

    let codes = Tensor::from_vec(
        (0..rows * width).map(|i| (i % 251) as f32 - 125.0).collect(),
        (rows, width),
        &Device::Cpu,
    );
    let codes: Tensor = codes.unwrap().to_dtype(DType::F8E4M3).unwrap();
    let scale = matrix(rows, 1, DType::F16);
    let plain = save(&[("m.weight", matrix(rows, width, DType::F32))]);
    let quantised = save(&[("m.weight._data", codes.clone()), ("m.weight._scale", scale.clone())]);
    let wide = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
    let dequantised = wide(&codes).broadcast_mul(&wide(&scale)).unwrap().to_dtype(DType::F16).unwrap();
    for (file, base) in [(plain, matrix(rows, width, DType::F32)), (quantised, wide(&dequantised))] {
        let monitor = Arc::new(LoadMonitor::default());
        let weights = Weights::open(&[file.path()]).unwrap().watched_by(Arc::clone(&monitor));
        let weights = weights.with_lora(Lora::open(lora.path(), &NONE).unwrap(), 0.25).unwrap();
        assert_eq!(monitor.bytes_read(), 0, "nothing is read before it is needed");
        let build = |vb: VarBuilder<'static>| vb.get((rows, width), "m.weight");
        let plan = weights.plan(DType::F32, &Device::Cpu, &NONE, build).unwrap();
        let merged = weights.load(DType::F32, &Device::Cpu, &NONE, build).unwrap();
        assert_eq!(monitor.bytes_read(), plan.bytes_to_read, "each byte once");
        let expected = (base + &change).unwrap();
        let error = (merged - &expected).unwrap().abs().unwrap().max_all().unwrap();
        let largest = expected.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error.to_scalar::<f32>().unwrap() <= largest * 1e-6);
    }
}
