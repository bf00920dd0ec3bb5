//! Archives as `torch.save` writes them, byte for byte where it matters: a pickle of protocol 2 and stored entries that
//! are aligned to 64 bytes.

use std::io::{Result, Seek, Write};

use zip::write::{SimpleFileOptions, ZipWriter};

/// What is saved.
pub enum Item {
    Tensor(View),
    Dict(Vec<(String, Item)>),
    List(Vec<Item>),
    Int(i32),
    Text(String),
    Nothing,
}

/// A view of a storage, in elements.
#[derive(Clone)]
pub struct View {
    pub storage: usize,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

impl View {
    /// All of storage number `storage` as `shape`, row by row.
    pub fn whole(storage: usize, shape: &[usize]) -> Self {
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i].max(1);
        }
        Self { storage, offset: 0, shape: shape.to_vec(), strides }
    }
}

/// Elements, and the class that torch has for their dtype; where it has none, the name of the dtype.
pub struct Storage<'a> {
    pub class: &'static str,
    pub len: usize,
    pub bytes: Bytes<'a>,
}

/// Writes a storage's bytes.
pub type Bytes<'a> = Box<dyn Fn(&mut dyn Write) -> Result<()> + 'a>;

impl Storage<'_> {
    /// A storage of `bytes` in memory.
    pub fn of(class: &'static str, len: usize, bytes: Vec<u8>) -> Self {
        Self { class, len, bytes: Box::new(move |out| out.write_all(&bytes)) }
    }

    fn is_typed(&self) -> bool {
        self.class.ends_with("Storage")
    }
}

/// Writes an archive of `pickle` and `storages`; `byteorder` since torch 2.1.
pub fn write(
    out: impl Write + Seek,
    pickle: &[u8],
    storages: &[Storage],
    byteorder: Option<&str>,
) -> Result<()> {
    let mut zip = ZipWriter::new(out);
    let options = SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Stored)
        .large_file(true)
        .with_alignment(64);
    zip.start_file("archive/data.pkl", options)?;
    zip.write_all(pickle)?;
    if let Some(byteorder) = byteorder {
        zip.start_file("archive/byteorder", options)?;
        zip.write_all(byteorder.as_bytes())?;
    }
    for (i, storage) in storages.iter().enumerate() {
        zip.start_file(format!("archive/data/{i}"), options)?;
        (storage.bytes)(&mut zip)?;
    }
    zip.start_file("archive/version", options)?;
    zip.write_all(b"3\n")?;
    zip.finish()?;
    Ok(())
}

/// The pickle of `root`.
pub fn pickle(root: &Item, storages: &[Storage]) -> Vec<u8> {
    let mut out = vec![0x80, 2];
    push(&mut out, root, storages);
    out.push(b'.');
    out
}

fn push(out: &mut Vec<u8>, item: &Item, storages: &[Storage]) {
    match item {
        Item::Nothing => out.push(b'N'),
        Item::Int(number) => int(out, *number as usize),
        Item::Text(text) => string(out, text),
        Item::List(items) => {
            out.extend(b"](");
            items.iter().for_each(|item| push(out, item, storages));
            out.push(b'e');
        }
        Item::Dict(items) => {
            out.extend(b"ccollections\nOrderedDict\n)R");
            for items in items.chunks(1000) {
                out.push(b'(');
                for (key, item) in items {
                    string(out, key);
                    push(out, item, storages);
                }
                out.push(b'u');
            }
        }
        Item::Tensor(view) => {
            let storage = &storages[view.storage];
            let function = if storage.is_typed() { "_rebuild_tensor_v2" } else { "_rebuild_tensor_v3" };
            global(out, "torch._utils", function);
            out.extend(b"((");
            string(out, "storage");
            match storage.is_typed() {
                true => global(out, "torch", storage.class),
                false => global(out, "torch.storage", "UntypedStorage"),
            }
            string(out, &view.storage.to_string());
            string(out, "cpu");
            int(out, storage.len);
            out.extend(b"tQ");
            int(out, view.offset);
            sizes(out, &view.shape);
            sizes(out, &view.strides);
            out.push(0x89);
            out.extend(b"ccollections\nOrderedDict\n)R");
            if !storage.is_typed() {
                global(out, "torch", storage.class);
            }
            out.extend(b"tR");
        }
    }
}

fn global(out: &mut Vec<u8>, module: &str, name: &str) {
    out.extend(format!("c{module}\n{name}\n").bytes());
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.bytes());
}

fn sizes(out: &mut Vec<u8>, sizes: &[usize]) {
    out.push(b'(');
    sizes.iter().for_each(|size| int(out, *size));
    out.push(b't');
}

fn int(out: &mut Vec<u8>, number: usize) {
    match i32::try_from(number) {
        Ok(number) => {
            out.push(b'J');
            out.extend(number.to_le_bytes());
        }
        Err(_) => {
            out.extend([0x8a, 8]);
            out.extend((number as u64).to_le_bytes());
        }
    }
}
