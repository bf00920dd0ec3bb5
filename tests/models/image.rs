//! Portraits and frames against the reference: resize, crop, masks, size buckets, colour, bytes.

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use talkie::media::image::{Buckets, PersonMasks, Portrait, Size, to_u8};
use talkie::pipeline::color;

use crate::support::{Component, GoldenFile, check, relative_error};

/// Tolerance for what is computed in floats; everything else must be equal.
const TOLERANCE: f64 = 1e-4;

fn size(value: &Value) -> Size {
    let side = |i: usize| value[i].as_u64().unwrap_or_else(|| panic!("{value} is not a size")) as usize;
    Size { height: side(0), width: side(1) }
}

/// `96x64`, as height and width.
fn named_size(name: &str) -> Size {
    let (height, width) = name.split_once('x').unwrap_or_else(|| panic!("`{name}` is not a size"));
    Size { height: height.parse().unwrap(), width: width.parse().unwrap() }
}

fn bytes(xs: &Tensor) -> Vec<u8> {
    xs.flatten_all().unwrap().to_vec1().unwrap()
}

fn equal(name: &str, actual: &Tensor, expected: &Tensor) {
    check("image", "f32", name, actual, expected, 0.0);
}

#[test]
fn everything() {
    let golden = Component::open("image");
    let config = golden.config()["files"].clone();
    resize(&golden.file("resize.safetensors"), &config["resize.safetensors"]);
    masks(&golden.file("resize.safetensors"), &config["resize.safetensors"]);
    buckets(&golden.json("buckets.json"));
    colors(&golden.file("color.safetensors"), &config["color.safetensors"]);
    bytes_of_frames(&golden.file("to_u8.safetensors"), &config["to_u8.safetensors"]);
    golden.finish();
}

fn resize(file: &GoldenFile, config: &Value) {
    for (name, source) in config["sources"].as_object().unwrap() {
        let src = file.get(&format!("{name}.src"));
        let source = size(source);
        assert_eq!(src.dims(), [source.height, source.width, 3]);
        let portrait = Portrait::from_rgb(source, bytes(&src)).unwrap();
        for target in config["targets"].as_array().unwrap() {
            let target = size(target);
            let name = format!("{name}.{}x{}", target.height, target.width);
            assert!(file.has(&format!("{name}.u8")), "{name} is configured but not there");
        }
        let prefix = format!("{name}.");
        for tensor in file.names() {
            let Some((target, kind)) = tensor.strip_prefix(&prefix).and_then(|rest| rest.split_once('.'))
            else {
                continue;
            };
            let fitted = portrait.fit(named_size(target));
            match kind {
                "u8" => {
                    let Size { height, width } = fitted.size();
                    let planes = Tensor::from_slice(fitted.rgb(), (height, width, 3), &Device::Cpu).unwrap();
                    let planes = planes.permute((2, 0, 1)).unwrap().contiguous().unwrap();
                    assert_eq!(bytes(&planes), bytes(&file.get(&tensor)), "{tensor}");
                }
                "norm" => {
                    let frame = fitted.to_tensor(&Device::Cpu).unwrap().unsqueeze(0).unwrap();
                    equal(&tensor, &frame, &file.f32(&tensor));
                }
                _ => panic!("{tensor}: unknown kind"),
            }
        }
    }
}

fn masks(file: &GoldenFile, config: &Value) {
    let face_scale = config["face_scale"].as_f64().unwrap();
    let boxes = || [0, 1].map(|i| [0, 1, 2, 3].map(|j| config["two_bbox"][i][j].as_u64().unwrap() as usize));
    for (name, case) in config["masks"].as_object().unwrap() {
        let (source, target) = (size(&case["source"]), size(&case["target"]));
        let masks = match name {
            _ if name.starts_with("one") => PersonMasks::one(source),
            _ if name.contains("bbox") => PersonMasks::from_boxes(source, boxes()).unwrap(),
            _ => PersonMasks::halves(source, face_scale),
        };
        assert_eq!(masks.planes().concat(), bytes(&file.get(&format!("mask.{name}.src"))), "{name}");
        let (latents, tokens) = (format!("mask.{name}.latent"), format!("mask.{name}.tokens"));
        equal(&latents, &masks.latents(target, &Device::Cpu).unwrap(), &file.f32(&latents));
        equal(&tokens, &masks.tokens(target, &Device::Cpu).unwrap(), &file.f32(&tokens));
    }
}

fn buckets(golden: &Value) {
    let tables = golden["tables"].as_object().unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(!tables.is_empty() && !cases.is_empty());
    for (name, table) in tables {
        let ours: Buckets = serde_json::from_value(table.clone()).unwrap();
        let short = name.rsplit('-').next().unwrap();
        match name.as_str() {
            "infinitetalk-480" => assert_eq!(ours, Buckets::infinitetalk_480()),
            "infinitetalk-720" => assert_eq!(ours, Buckets::infinitetalk_720()),
            _ => {}
        }
        for case in cases {
            let source = Size {
                height: case["h"].as_u64().unwrap() as usize,
                width: case["w"].as_u64().unwrap() as usize,
            };
            let expected = &case[short];
            let bucket = ours.choose(source);
            assert_eq!(bucket.key, expected["key"].as_str().unwrap(), "{name} {source:?}");
            assert_eq!(bucket.size, size(&expected["hw"]), "{name} {source:?}");
        }
    }
}

fn colors(file: &GoldenFile, config: &Value) {
    let matrix = |m: [[f64; 3]; 3]| Tensor::new(&m, &Device::Cpu).unwrap();
    check("colour", "f64", "xyz_from_rgb", &matrix(color::XYZ_FROM_RGB), &file.get("xyz_from_rgb"), 1e-12);
    check("colour", "f64", "rgb_from_xyz", &matrix(color::RGB_FROM_XYZ), &file.get("rgb_from_xyz"), 1e-12);
    let convert = |from: &str, to: &str, with: fn(&[f32]) -> Vec<f32>| {
        let source = file.f32(from);
        let ours = Tensor::from_vec(with(&file.vec_f32(from)), source.dims(), &Device::Cpu).unwrap();
        check("colour", "f32", to, &ours, &file.f32(to), TOLERANCE);
    };
    convert("rgb01", "lab", color::rgb_to_lab);
    convert("lab", "lab_back", color::lab_to_rgb);
    convert("grid_rgb", "grid_lab", color::rgb_to_lab);
    convert("wild_lab", "wild_rgb", color::lab_to_rgb);

    let (video, reference) =
        (file.f32("video").squeeze(0).unwrap(), file.f32("reference").squeeze(0).unwrap());
    let strengths = config["strengths"].as_array().unwrap();
    let mut names: Vec<_> = file.names().into_iter().filter(|n| n.starts_with("out.")).collect();
    assert_eq!(names.len(), strengths.len());
    for name in names.drain(..) {
        let strength: f64 = name.strip_prefix("out.strength_").unwrap().parse().unwrap();
        assert!(strengths.iter().any(|s| s.as_f64() == Some(strength)), "{name} is not configured");
        let ours = color::match_colors(&video, &reference, strength).unwrap().unsqueeze(0).unwrap();
        let expected = file.f32(&name);
        check("colour", "f32", &name, &ours, &expected, TOLERANCE);
        // The comparison would notice another reference frame.
        let other = (&reference * 0.9).unwrap();
        let wrong = color::match_colors(&video, &other, strength).unwrap().unsqueeze(0).unwrap();
        assert!(strength == 0.0 || relative_error(&wrong, &expected) > TOLERANCE);
    }
}

fn bytes_of_frames(file: &GoldenFile, config: &Value) {
    let x = file.vec_f32("x");
    assert_eq!(Some(x.len() as u64), config["count"].as_u64());
    let ours: Vec<u8> = x.into_iter().map(to_u8).collect();
    let expected = file.get("u8");
    assert_eq!(expected.dtype(), DType::U8);
    assert_eq!(ours, bytes(&expected));
}
