//! Weight files from an enemy, or from bad luck: each is refused with the file, what is wrong with it and where.

use std::path::Path;

use candle_core::{DType, Device};
use talkie::ErrorKind;
use talkie::weights::Weights;

use super::archive::{self, Item, Storage, View};

/// A file's bytes, and words of the error that it must give.
type Case = (&'static str, Vec<u8>, &'static str);

/// A safetensors file of `header` and `data_bytes` zeros.
fn safetensors(header: &[u8], data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

/// The entry of two f32 at `offsets`.
fn entry(name: &str, offsets: [u64; 2]) -> String {
    format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets":{offsets:?}}}"#)
}

fn broken_safetensors() -> Vec<Case> {
    let header =
        |entries: &[String], bytes| safetensors(format!("{{{}}}", entries.join(",")).as_bytes(), bytes);
    let one = |entry: &str, bytes| safetensors(format!(r#"{{"x":{entry}}}"#).as_bytes(), bytes);
    let length = |length: u64, rest: &[u8]| [&length.to_le_bytes()[..], rest].concat();
    let many = (0..65_537).map(|i| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#));
    let tar = [&[b'x'; 257][..], b"ustar", &[0; 250]].concat();
    vec![
        ("empty", vec![], "0 bytes are too few"),
        ("seven bytes", vec![1; 7], "7 bytes are too few"),
        ("length 2^64 - 1", length(u64::MAX, b"{}"), "header of 18446744073709551615 bytes"),
        ("length 101 MB", length(101_000_000, b"{}"), "expected at most 100000000"),
        ("length past the end", length(1000, b"{}"), "cut short"),
        ("a header of spaces", safetensors(&[b' '; 100_000], 0), "header: EOF"),
        ("deep nesting", safetensors(&[b'['; 100_000], 0), "header: "),
        ("deep nesting of an entry", one(&"[".repeat(100_000), 0), "tensor `x`"),
        ("a web page", b"<!DOCTYPE html><html>403 Forbidden</html>".to_vec(), "web page"),
        ("an XML answer", b"\n<?xml version='1.0'?><Error/>".to_vec(), "web page"),
        (
            "a pointer of Git LFS",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00".to_vec(),
            "Git LFS",
        ),
        (
            "torch before 1.6",
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.".to_vec(),
            "torch before 1.6",
        ),
        (
            "a bare pickle",
            b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00}\x94.".to_vec(),
            "torch.save(torch.load",
        ),
        ("torch before 0.1.10", tar, "torch before 1.6"),
        ("no UTF-8", safetensors(b"{\"\xff\xfe\":1}", 0), "header: "),
        ("overlapping", header(&[entry("x", [0, 8]), entry("y", [4, 12])], 12), "`y` starts at byte 4"),
        ("the same place", header(&[entry("x", [0, 8]), entry("y", [0, 8])], 8), "overlaps the one before"),
        ("a hole", header(&[entry("x", [0, 8]), entry("y", [12, 20])], 20), "follows a hole"),
        ("a hole at the start", header(&[entry("x", [8, 16])], 16), "follows a hole"),
        ("one name twice", header(&[entry("x", [0, 8]), entry("x", [8, 16])], 16), "`x` is there twice"),
        ("cut short", header(&[entry("x", [0, 8])], 7), "`x` ends at byte 8 of 7"),
        ("bytes at the end", header(&[entry("x", [0, 8])], 9), "`x` is the last and ends at byte 8 of 9"),
        ("too few bytes", header(&[entry("x", [0, 4])], 4), "`x` takes 8 bytes"),
        ("offsets reversed", header(&[entry("x", [8, 0])], 8), "`x` takes 8 bytes"),
        ("offsets of 2^64", header(&[entry("x", [0, u64::MAX])], 8), "`x` takes 8 bytes"),
        (
            "a shape of 2^65",
            one(r#"{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,0]}"#, 0),
            "overflows",
        ),
        (
            "a negative dimension",
            one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#, 4),
            "`x`: invalid value",
        ),
        (
            "half a dimension",
            one(r#"{"dtype":"F32","shape":[0.5],"data_offsets":[0,4]}"#, 4),
            "`x`: invalid type",
        ),
        (
            "nine dimensions",
            one(r#"{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}"#, 4),
            "more than 8 dimensions",
        ),
        (
            "an unknown dtype",
            one(r#"{"dtype":"Q8","shape":[1],"data_offsets":[0,4]}"#, 4),
            "`x`: unknown variant",
        ),
        ("no shape", one(r#"{"dtype":"F32","data_offsets":[0,4]}"#, 4), "missing field `shape`"),
        (
            "an unknown key",
            one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4],"z":1}"#, 4),
            "unknown field `z`",
        ),
        ("an entry that is a number", one("7", 0), "`x`: invalid type"),
        ("a list", safetensors(b"[]", 0), "an object of tensors"),
        ("half a header", safetensors(b"{", 0), "header: EOF"),
        ("two headers", safetensors(b"{}{}", 0), "trailing characters"),
        ("metadata of numbers", safetensors(br#"{"__metadata__":{"a":1}}"#, 0), "expected a string"),
        ("a name of 2000 bytes", header(&[entry(&"n".repeat(2000), [0, 8])], 8), "a name of 2000 bytes"),
        ("65537 tensors", header(&many.collect::<Vec<_>>(), 0), "more than 65536 tensors"),
    ]
}

/// A storage of four f32.
fn four() -> Vec<Storage<'static>> {
    vec![Storage::of("FloatStorage", 4, vec![0; 16])]
}

fn archive_of(pickle: &[u8], storages: &[Storage], byteorder: Option<&str>) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    archive::write(&mut bytes, pickle, storages, byteorder).unwrap();
    bytes.into_inner()
}

/// An archive of `pickle` after the mark of its protocol, and four f32.
fn pickled(pickle: &[u8]) -> Vec<u8> {
    archive_of(&[b"\x80\x02", pickle].concat(), &four(), None)
}

/// An archive of one tensor `x`, which is `view` of four f32.
fn viewed(offset: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
    let view = View { storage: 0, offset, shape: shape.to_vec(), strides: strides.to_vec() };
    let item = Item::Dict(vec![("x".to_owned(), Item::Tensor(view))]);
    archive_of(&archive::pickle(&item, &four()), &four(), None)
}

/// A sound archive.
fn sound() -> Vec<u8> {
    viewed(0, &[2, 2], &[2, 1])
}

/// `bytes` with `to` in the place of the `n`th `from`, which is as long.
fn patched(mut bytes: Vec<u8>, from: &[u8], n: usize, to: &[u8]) -> Vec<u8> {
    let at = bytes.windows(from.len()).enumerate().filter(|(_, window)| *window == from).nth(n);
    let at = at.unwrap_or_else(|| panic!("{from:?} is not there {n} times")).0;
    bytes[at..at + to.len()].copy_from_slice(to);
    bytes
}

/// `sound` with the byte at `offset` of the central header of entry `name` replaced.
fn central(name: &str, offset: usize, to: &[u8]) -> Vec<u8> {
    let mut bytes = sound();
    let header = bytes
        .windows(46 + name.len())
        .rposition(|window| window.starts_with(b"PK\x01\x02") && window.ends_with(name.as_bytes()));
    let header = header.expect("the entry is there");
    bytes[header + offset..header + offset + to.len()].copy_from_slice(to);
    bytes
}

/// `('storage', <class>, <key>, 'cpu', <len>)` as the persistent id of a storage, and a tensor of it.
fn tensor_of(class: &str, key: &str, len: u8) -> Vec<u8> {
    let text = |text: &str| [&b"X"[..], &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let id = [&b"("[..], &text("storage"), class.as_bytes(), &text(key), &text("cpu"), &[b'K', len], b"tQ"]
        .concat();
    let args = b"K\x00(K\x02t(K\x01t\x89NtR";
    [&b"}"[..], &text("x"), b"ctorch._utils\n_rebuild_tensor_v2\n(", &id, args, b"s."].concat()
}

fn global(module: &str, name: &str) -> Vec<u8> {
    pickled(format!("c{module}\n{name}\n(X\x02\0\0\0idtR.").as_bytes())
}

fn broken_archives() -> Vec<Case> {
    let cut = |keep: fn(usize) -> usize| {
        let bytes = sound();
        bytes[..keep(bytes.len())].to_vec()
    };
    let float = "ctorch\nFloatStorage\n";
    let nested = |depth: usize| {
        [b"}".to_vec(), [&b"X\x01\0\0\0a}"[..]].concat().repeat(depth), b"s".repeat(depth), b".".to_vec()]
            .concat()
    };
    // Each dict holds the one before under two names: 2^40 names in 40 steps.
    let mut doubling = b"}q\x00".to_vec();
    for i in 0..12u8 {
        doubling.extend([
            b'}',
            b'(',
            b'K',
            0,
            b'h',
            i,
            b'K',
            1,
            b'h',
            i,
            b'K',
            2,
            b'h',
            i,
            b'K',
            3,
            b'h',
            i,
            b'u',
            b'q',
            i + 1,
        ]);
    }
    doubling.push(b'.');
    let tuples = [&b"("[..], &b")".repeat(60_000), b"t"].concat().repeat(40);
    let twice = Item::Dict(vec![
        ("a".to_owned(), Item::Dict(vec![("b".to_owned(), Item::Tensor(View::whole(0, &[4])))])),
        ("a.b".to_owned(), Item::Tensor(View::whole(0, &[4]))),
    ]);
    let wide = "n".repeat(600);
    let long = Item::Dict(vec![(wide.clone(), Item::Dict(vec![(wide, Item::Tensor(View::whole(0, &[4])))]))]);
    let tensor = Item::Tensor(View::whole(0, &[4]));
    let two = archive_of(b"\x80\x02}.", &[four(), four()].into_iter().flatten().collect::<Vec<_>>(), None);
    let local = |bytes: Vec<u8>| bytes.windows(4).position(|w| w == b"PK\x01\x02").unwrap() as u32;
    let directory = local(sound());
    vec![
        ("not an archive", b"PK\x03\x04 torch archive".to_vec(), "as a zip archive"),
        ("half an archive", cut(|len| len / 2), "as a zip archive"),
        ("an archive without its last byte", cut(|len| len - 1), "as a zip archive"),
        (
            "no pickle",
            patched(patched(sound(), b"data.pkl", 1, b"code.pkl"), b"data.pkl", 0, b"code.pkl"),
            "without `<folder>/data.pkl`",
        ),
        ("a compressed pickle", central("archive/data.pkl", 10, &[8, 0]), "`archive/data.pkl` is compressed"),
        (
            "a compressed storage",
            central("archive/data/0", 10, &[8, 0]),
            "tensor `x` the entry `archive/data/0` is compressed",
        ),
        ("an encrypted storage", central("archive/data/0", 8, &[1, 0]), "encrypted"),
        (
            "a storage in the directory",
            central("archive/data/0", 42, &directory.to_le_bytes()),
            "as a zip archive",
        ),
        (
            "a storage past the end",
            central("archive/data/0", 42, &u32::MAX.wrapping_sub(1).to_le_bytes()),
            "as a zip archive",
        ),
        ("a storage over another", central("archive/data/0", 42, &[0; 4]), "overlap"),
        ("a longer storage", central("archive/data/0", 20, &[200, 0, 0, 0, 200, 0, 0, 0]), "overlap"),
        (
            "a shorter storage",
            central("archive/data/0", 20, &[12, 0, 0, 0, 12, 0, 0, 0]),
            "`x` lies in a storage of 12 bytes that is to have 16",
        ),
        (
            "two entries of one name",
            patched(patched(two, b"data/1", 1, b"data/0"), b"data/1", 0, b"data/0"),
            "two have the same name",
        ),
        (
            "an unknown byte order",
            archive_of(b"\x80\x02}.", &four(), Some("middle")),
            "the byte order `middle`",
        ),
        ("a view past the end", viewed(1, &[2, 2], &[2, 1]), "`x` is the view [2, 2] by [2, 1] from 1"),
        ("an offset past the end", viewed(100, &[1], &[1]), "lies outside"),
        ("an offset of 2^63", viewed(1 << 62, &[2], &[usize::MAX >> 1]), "lies outside"),
        ("a stride past the end", viewed(0, &[2], &[1 << 62]), "lies outside"),
        ("a shape of 2^66", viewed(0, &[1 << 62, 16], &[0, 0]), "overflows"),
        ("an element that is repeated", viewed(0, &[1 << 40], &[0]), "repeats the elements"),
        ("more strides than dimensions", viewed(0, &[2], &[1, 1]), "1 dimensions and 2 strides"),
        ("nine dimensions", viewed(0, &[1; 9], &[1; 9]), "9 dimensions"),
        (
            "a missing storage",
            pickled(&tensor_of(float, "1", 4)),
            "`x` the archive has no entry `archive/data/1`",
        ),
        ("a storage outside", pickled(&tensor_of(float, "../../etc/passwd", 4)), "no entry"),
        ("a storage that is too short", pickled(&tensor_of(float, "0", 5)), "16 bytes that is to have 20"),
        (
            "a storage of an unknown class",
            pickled(&tensor_of("ctorch\nQInt8Storage\n", "0", 4)),
            "`torch.QInt8Storage`",
        ),
        (
            "bytes without a dtype",
            pickled(&tensor_of("ctorch.storage\nUntypedStorage\n", "0", 16)),
            "without a dtype",
        ),
        ("a storage that is no class", pickled(&tensor_of("N", "0", 4)), "that is no storage"),
        ("os.system", global("os", "system"), "the global `os.system`"),
        ("builtins.eval", global("builtins", "eval"), "the global `builtins.eval`"),
        ("posix.system", global("posix", "system"), "it was not run"),
        ("torch.load", global("torch", "load"), "the global `torch.load`"),
        ("numpy", global("numpy.core.multiarray", "_reconstruct"), "numpy.core.multiarray"),
        ("a global from the stack", pickled(b"\x8c\x02os\x8c\x06system\x93."), "the global `os.system`"),
        ("a global without an end", pickled(b"cos"), "does not end"),
        (
            "a class that is called wrongly",
            pickled(b"ccollections\nOrderedDict\nK\x01\x85R."),
            "a call of OrderedDict with 1 arguments",
        ),
        ("a number that is called", pickled(b"K\x01)R."), "no function"),
        ("a text of 4 GB", pickled(b"X\xff\xff\xff\xff"), "4294967295 bytes are announced"),
        (
            "a text of 2^64",
            pickled(b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff"),
            "18446744073709551615 bytes are announced",
        ),
        ("bytes of 4 GB", pickled(b"B\xff\xff\xff\xff"), "4294967295 bytes are announced"),
        ("a text that is no UTF-8", pickled(b"X\x01\0\0\0\xff."), "no UTF-8"),
        ("an instruction for objects", pickled(b"}}\x81."), "instruction 0x81"),
        ("a pickle without an end", pickled(b"}"), "cut short"),
        ("a pickle in half an instruction", pickled(b"X\x01"), "cut short"),
        ("an empty pickle", archive_of(b"", &four(), None), "cut short"),
        ("protocol 9", archive_of(b"\x80\x09}.", &four(), None), "protocol 9"),
        ("an empty stack", pickled(b"0."), "instruction 0x30"),
        ("a result from nothing", pickled(b"."), "empty stack"),
        ("a value from before a mark", pickled(b"}(K\x01s."), "empty stack"),
        ("no mark", pickled(b"}u."), "a mark is missing"),
        ("an odd number of items", pickled(b"}(K\x01u."), "a key without a value"),
        ("items for a number", pickled(b"K\x01(K\x01K\x01u."), "no parts"),
        ("a list of pairs", pickled(b"](K\x01K\x01u."), "no dict"),
        ("something never remembered", pickled(b"h\x07."), "never remembered"),
        ("a state for a tuple", pickled(b")}b."), "no dict"),
        (
            "70000 values",
            pickled(&[&b"K\x01".repeat(70_000)[..], b"."].concat()),
            "65536 values on the stack",
        ),
        ("4 million values", pickled(&[&tuples[..], b"."].concat()), "more than 4194304 values"),
        ("16 million names", pickled(&doubling), "values in its dicts"),
        ("dicts in dicts", pickled(&nested(40)), "dicts in dicts, more than 16"),
        ("one tensor", archive_of(&archive::pickle(&tensor, &four()), &four(), None), "without a name"),
        ("a number", pickled(b"K\x01."), "expected a dict"),
        (
            "one name twice",
            archive_of(&archive::pickle(&twice, &four()), &four(), None),
            "`a.b` is there twice",
        ),
        (
            "a long name",
            archive_of(&archive::pickle(&long, &four()), &four(), None),
            "a tensor's name of more than 1024",
        ),
    ]
}

#[test]
fn every_broken_file_is_refused_with_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    let cases = [("safetensors", broken_safetensors()), ("pth", broken_archives())];
    let count = cases.iter().map(|(_, cases)| cases.len()).sum::<usize>();
    assert!(count >= 40);
    for (extension, cases) in cases {
        for (name, bytes, expected) in cases {
            let path = dir.path().join(format!("{name}.{extension}"));
            std::fs::write(&path, bytes).unwrap();
            match Weights::open(&[&path]) {
                Ok(weights) => wrong.push(format!("{name}: opened, {:?}", weights.names())),
                Err(error) => {
                    let message = error.to_string();
                    let says = message.contains(expected) && message.contains(path.to_str().unwrap());
                    if error.kind() != ErrorKind::ModelCorrupt || !says || message.len() > 4096 {
                        wrong.push(format!("{name}: {:?} {message}\n    expected {expected}", error.kind()));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_torch_wrote_is_read() {
    let media = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/media");
    let expected = std::fs::read(media.join("torch-expected.safetensors")).unwrap();
    let expected = safetensors::SafeTensors::deserialize(&expected).unwrap();
    for file in ["torch-dict.pth", "torch-dict-protocol-5.pth"] {
        let weights = Weights::open(&[media.join(file)]).unwrap();
        let mut names: Vec<_> = expected.names().into_iter().map(str::to_owned).collect();
        names.sort();
        assert_eq!(weights.names(), names);
        let vb = weights.var_builder(DType::F32, &Device::Cpu);
        for (name, view) in expected.tensors() {
            if ["i64", "mask", "module.1.num_batches_tracked"].contains(&name.as_str()) {
                let message = vb.get(view.shape(), &name).unwrap_err().to_string();
                assert!(message.contains("which no network here uses"), "{name}: {message}");
                continue;
            }
            let tensor = vb.get(view.shape(), &name).unwrap();
            let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
            assert_eq!(bytes, view.data(), "{file} {name}");
        }
    }
    let wrapped = Weights::open(&[media.join("torch-wrapped.pth")]).unwrap();
    assert_eq!(wrapped.names()[..2], ["0.bias", "0.weight"]);
    let error = Weights::open(&[media.join("torch-legacy.pth")]).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("torch before 1.6"), "{error}");
}

/// Changes of `bytes` that are the same each time: bits and bytes, cuts, repetitions and copies from elsewhere.
fn mutate(bytes: &[u8], seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below.max(1) as u64) as usize
    };
    let mut out = bytes.to_vec();
    for _ in 0..1 + next(4) {
        let (at, len) = (next(out.len()), next(16));
        let end = (at + len).min(out.len());
        match next(7) {
            0 if !out.is_empty() => out[at] ^= 1 << next(8),
            1 if !out.is_empty() => out[at] = [0, 0xff, 0x7f, 0x80, b'(', b'}', b'h'][next(7)],
            2 => out.truncate(at),
            3 => drop(out.drain(at..end)),
            4 => {
                let part = out[at..end].to_vec();
                let to = next(out.len());
                out.splice(to..to, part);
            }
            5 => {
                let from = next(bytes.len().saturating_sub(len));
                out.splice(at..end, bytes[from..(from + len).min(bytes.len())].iter().copied());
            }
            _ => out[at..end].fill(0xff),
        }
    }
    out
}

#[test]
fn a_changed_file_is_read_or_refused() {
    let media = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/media");
    let rounds = std::env::var("TALKIE_MUTATIONS").map_or(1500, |rounds| rounds.parse().unwrap());
    let pickle = archive::pickle(
        &Item::Dict(vec![
            ("x".to_owned(), Item::Tensor(View::whole(0, &[2, 2]))),
            ("n".to_owned(), Item::Int(7)),
        ]),
        &four(),
    );
    let header = format!("{{{},{}}}", entry("x", [0, 8]), entry("y", [8, 16]));
    type Wrap = fn(Vec<u8>) -> Vec<u8>;
    let seeds: [(&str, Vec<u8>, Wrap); 5] = [
        ("torch", std::fs::read(media.join("torch-wrapped.pth")).unwrap(), |bytes| bytes),
        ("archive", sound(), |bytes| bytes),
        ("pickle", pickle, |pickle| archive_of(&pickle, &four(), None)),
        ("safetensors", safetensors(header.as_bytes(), 16), |bytes| bytes),
        ("header", header.into_bytes(), |header| safetensors(&header, 16)),
    ];
    let file = tempfile::NamedTempFile::new().unwrap();
    for (name, bytes, wrap) in seeds {
        let mut refused = 0;
        for seed in 0..rounds {
            std::fs::write(file.path(), wrap(mutate(&bytes, seed))).unwrap();
            let weights = match Weights::open(&[file.path()]) {
                Ok(weights) => weights,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::ModelCorrupt, "{name} {seed}: {error}");
                    refused += 1;
                    continue;
                }
            };
            let vb = weights.var_builder(DType::F32, &Device::Cpu);
            for tensor in weights.names() {
                // Any values, or an error.
                let _ = vb.get_unchecked(&tensor);
            }
        }
        assert!(refused > rounds / 4, "{name}: {refused} of {rounds} are refused");
    }
}
