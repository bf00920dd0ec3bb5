//! Parity: quantised weights in quanto's layout.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde_json::Value;
use talkie::models::wan::{Config, Model};
use talkie::nn::Linear;
use talkie::weights::{Weights, quant};

use crate::support::{Component, GoldenFile, check, relative_error, root};

const TOLERANCE: f64 = 1e-4;
const TOLERANCE_BF16: f64 = 3e-2;
const NONE: [&str; 0] = [];

/// How a state dict is stored.
#[derive(Clone, Copy)]
enum Format {
    Int8,
    Fp8,
}

impl Format {
    fn of(tag: &str) -> Self {
        match tag {
            "int8" => Self::Int8,
            "fp8" => Self::Fp8,
            other => panic!("format {other}"),
        }
    }

    /// The largest value that a scale of one stands for.
    fn largest(self) -> f32 {
        match self {
            Self::Int8 => 127.0,
            Self::Fp8 => 448.0,
        }
    }

    /// Data (as f32) and scale of a `weight` (out, in), computed in its dtype: symmetric, per row.
    fn quantize(self, weight: &Tensor) -> (Tensor, Tensor) {
        let dtype = weight.dtype();
        // A division: `tensor / number` multiplies by the reciprocal, which rounds differently.
        let largest = Tensor::new(self.largest(), &Device::Cpu).unwrap();
        let scale = weight.abs().unwrap().max_keepdim(D::Minus1).unwrap().to_dtype(DType::F32).unwrap();
        let scale = scale.broadcast_div(&largest).unwrap().to_dtype(dtype).unwrap();
        let wide = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
        let data = wide(weight).broadcast_div(&wide(&scale)).unwrap().to_dtype(dtype).unwrap();
        let data = match self {
            // Half to even, which candle's `round` is not.
            Self::Int8 => {
                let values: Vec<f32> = wide(&data).flatten_all().unwrap().to_vec1().unwrap();
                let values: Vec<_> =
                    values.into_iter().map(|v| v.round_ties_even().clamp(-128.0, 127.0)).collect();
                Tensor::from_vec(values, data.dims(), &Device::Cpu).unwrap()
            }
            Self::Fp8 => wide(&wide(&data).to_dtype(DType::F8E4M3).unwrap()),
        };
        (data, scale)
    }
}

fn dtype(name: &str) -> DType {
    match name {
        "f32" | "float32" => DType::F32,
        "bf16" | "bfloat16" => DType::BF16,
        other => panic!("dtype {other}"),
    }
}

fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F32 { TOLERANCE } else { TOLERANCE_BF16 }
}

#[test]
fn every_golden() {
    let goldens = Component::open("quant");
    let config = goldens.config();
    let base = GoldenFile::open(config["base"].as_str().expect("`base` is a path"));
    let mut maps = BTreeMap::new();
    for (name, settings) in config["files"].as_object().expect("`files` is an object") {
        if let Some((tag, _)) = name.split_once("_state_dict") {
            maps.insert(tag.to_owned(), state_dict(&goldens, name, tag, settings, &base));
        }
    }
    for (name, settings) in config["files"].as_object().expect("`files` is an object") {
        if settings.get("dit_out").is_some() {
            let io = goldens.file(name);
            products(&io, settings, &base);
            forwards(&io, &settings["dit_out"], &config, &maps, &base);
        }
    }
    goldens.finish();
}

/// A whole state dict: the original quantised again is what is stored, and what is given out is what it stands for.
fn state_dict(
    goldens: &Component,
    name: &str,
    tag: &str,
    settings: &Value,
    base: &GoldenFile,
) -> BTreeSet<String> {
    let (file, format) = (goldens.file(name), Format::of(tag));
    let json = goldens.json(&format!("{tag}_map.json"));
    assert_eq!(json, file.metadata("map"), "{tag}: the map beside the file and the one in it");
    let map = quant::Map::parse(&json.to_string()).unwrap();
    let modules = map.modules();
    let dtype = dtype(settings["base_cast_to"].as_str().expect("`base_cast_to` is a dtype"));

    let weights = Weights::open(&[root().join("quant").join(name)]).unwrap();
    weights.check_quantized(&map).unwrap();
    let vb = weights.var_builder(dtype, &Device::Cpu);
    for original in base.names() {
        let expected = base.get(&original).to_dtype(dtype).unwrap();
        let actual = vb.get(expected.dims(), &original).unwrap();
        let module = original.strip_suffix(".weight").filter(|module| modules.contains(*module));
        let Some(module) = module else {
            assert_eq!(relative_error(&file.get(&original), &expected), 0.0, "{tag} {original}");
            assert_eq!(relative_error(&actual, &expected), 0.0, "{tag} {original}");
            continue;
        };
        let (data, scale) = (file.f32(&format!("{original}._data")), file.get(&format!("{original}._scale")));
        let (our_data, our_scale) = format.quantize(&expected);
        assert_eq!(relative_error(&our_scale, &scale), 0.0, "{tag} {original}: scale");
        assert_eq!(relative_error(&our_data, &data), 0.0, "{tag} {original}: data");
        let product =
            data.broadcast_mul(&scale.to_dtype(DType::F32).unwrap()).unwrap().to_dtype(dtype).unwrap();
        check("quant", dtype.as_str(), &format!("{tag} {original}"), &actual, &product, 0.0);
        for unused in ["input_scale", "output_scale"].map(|scale| format!("{module}.{scale}")) {
            if file.has(&unused) {
                assert_eq!(file.get(&unused).elem_count(), 1, "{unused}");
            }
        }
    }
    weights.finish(&NONE).unwrap();
    modules
}

/// One module in each format and dtype: data, scale, product, and the linear layer.
fn products(io: &GoldenFile, settings: &Value, base: &GoldenFile) {
    let module = settings["module"].as_str().expect("`module` is a name");
    let short = module.rsplit('.').next().unwrap();
    let (weight, bias) = (format!("{module}.weight"), format!("{module}.bias"));
    let source = io.f32(&format!("source.{short}.weight"));
    assert_eq!(relative_error(&source, &base.f32(&weight)), 0.0);
    let data_of = |name: &String| name.strip_suffix(&format!(".{short}.data")).map(str::to_owned);
    let cases: Vec<_> = io.names().iter().filter_map(data_of).collect();
    assert!(!cases.is_empty());
    for case in cases {
        let (tag, dtype_name) = case.split_once('.').unwrap();
        let dtype = dtype(dtype_name);
        let get = |what: &str| io.get(&format!("{case}.{what}"));
        let (data, scale) = (get(&format!("{short}.data")), get(&format!("{short}.scale")));

        let (our_data, our_scale) = Format::of(tag).quantize(&source.to_dtype(dtype).unwrap());
        assert_eq!(relative_error(&our_scale, &scale), 0.0, "{case}: scale");
        assert_eq!(relative_error(&our_data, &data.to_dtype(DType::F32).unwrap()), 0.0, "{case}: data");

        let tensors = [(format!("{weight}._data"), data), (format!("{weight}._scale"), scale)];
        let weights = Weights::from_tensors(HashMap::from(tensors));
        let build = |vb: VarBuilder<'static>| vb.get(source.dims(), &weight);
        let dequantized = weights.load(dtype, &Device::Cpu, &NONE, build).unwrap();
        check(
            "quant",
            dtype_name,
            &format!("{case} product"),
            &dequantized,
            &get(&format!("{short}.dequant")),
            0.0,
        );

        let bias = base.get(&bias).to_dtype(dtype).unwrap();
        let out = Linear::from_parts(dequantized, Some(bias)).forward(&get("linear.in")).unwrap();
        check("quant", dtype_name, &format!("{case} linear"), &out, &get("linear.out"), tolerance(dtype));
    }
}

/// The DiT with quantised f32 weights.
fn forwards(
    io: &GoldenFile,
    settings: &Value,
    config: &Value,
    maps: &BTreeMap<String, BTreeSet<String>>,
    base: &GoldenFile,
) {
    let cfg: Config = serde_json::from_value(config["dit_model"].clone()).expect("a DiT config");
    let inputs = GoldenFile::open(settings["inputs"].as_str().expect("`inputs` is a path"));
    let timestep = settings["t"].as_f64().expect("`t` is a number");
    let run = |tensors: HashMap<String, Tensor>| {
        let build = |vb: VarBuilder<'static>| Model::new(&cfg, vb);
        let model = Weights::from_tensors(tensors).load(DType::F32, &Device::Cpu, &NONE, build).unwrap();
        let context = model.encode_context(&inputs.f32("context"), &inputs.f32("clip")).unwrap();
        let audio = model.encode_audio(&inputs.f32("audio")).unwrap();
        let (latents, y, masks) =
            (inputs.f32("latent"), inputs.f32("y").squeeze(0).unwrap(), inputs.f32("masks"));
        model.forward(&latents, &y, timestep, &context, &audio, Some(&masks)).unwrap()
    };
    let mut checked = 0;
    for (tag, modules) in maps {
        let mut tensors = HashMap::new();
        for name in base.names() {
            let tensor = base.f32(&name);
            if name.strip_suffix(".weight").is_some_and(|module| modules.contains(module)) {
                let (data, scale) = Format::of(tag).quantize(&tensor);
                tensors.insert(format!("{name}._data"), data);
                tensors.insert(format!("{name}._scale"), scale);
            } else {
                tensors.insert(name, tensor);
            }
        }
        let expected = io.f32(&format!("{tag}.dit_out"));
        check("quant", "f32", &format!("{tag}.dit_out"), &run(tensors.clone()), &expected, TOLERANCE);
        checked += 1;

        // Negative control: one scale off by a tenth is noticed.
        let scale = tensors.keys().find(|name| name.contains("self_attn.v") && name.ends_with("._scale"));
        let scale = scale.expect("the values of self-attention are quantised").clone();
        let off = (&tensors[&scale] * 1.1).unwrap();
        tensors.insert(scale, off);
        assert!(relative_error(&run(tensors), &expected) > TOLERANCE, "{tag}");
    }
    assert_eq!(checked, io.names().iter().filter(|name| name.ends_with(".dit_out")).count());
}
