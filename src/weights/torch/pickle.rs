//! A pickle without Python: as much of the format as `torch.save` writes of dicts of tensors. Nothing is run: a
//! global is one of a few known ones, or an error.
//!
//! Values live in an arena and refer to each other by index, so that what a hostile pickle says twice is there once,
//! and what it nests deeply is neither walked nor dropped by recursion.

use std::collections::HashMap;

use safetensors::Dtype;

use super::globals::Global;

/// The longest pickle that is read. A checkpoint of a thousand tensors has a tenth of a megabyte.
pub(super) const MAX_BYTES: u64 = 32 << 20;

/// Values, items and remembered places of one pickle: they then take less than 128 MiB.
const MAX_ITEMS: usize = 1 << 22;

/// Values on the stack; `torch.save` puts two thousand there before it takes them off.
const MAX_STACK: usize = 1 << 16;

/// Of a global's name in an error.
const MAX_LISTED_CHARS: usize = 200;

/// Something in a pickle.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value {
    /// `None`, a number, or bytes: nothing that a tensor or a name is made from.
    Other,
    Int(i64),
    Text(Text),
    Global(Global),
    Node(u32),
}

/// A text: a place in the pickle.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Text {
    start: u32,
    len: u32,
}

/// A value of parts.
#[derive(Debug)]
pub(super) enum Node {
    Dict(Vec<(Value, Value)>),
    List(Vec<Value>),
    Tuple(Vec<Value>),
    Storage(Storage),
    Tensor(Tensor),
}

/// Where elements lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Storage {
    pub(super) dtype: Option<Dtype>,
    pub(super) key: Text,
    /// In elements, or in bytes where there is no dtype.
    pub(super) len: u64,
}

/// A view of a storage.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub(super) storage: Storage,
    pub(super) dtype: Dtype,
    /// Of the first element, in elements.
    pub(super) offset: u64,
    pub(super) shape: Vec<usize>,
    /// In elements.
    pub(super) strides: Vec<usize>,
}

/// A pickle that was read.
pub(super) struct Pickle<'a> {
    bytes: &'a [u8],
    nodes: Vec<Node>,
    pub(super) root: Value,
}

impl Pickle<'_> {
    pub(super) fn node(&self, value: Value) -> Option<&Node> {
        match value {
            Value::Node(index) => self.nodes.get(index as usize),
            _ => None,
        }
    }

    pub(super) fn text(&self, text: Text) -> &str {
        text_of(self.bytes, text)
    }
}

/// Every [`Text`] was checked to lie in the pickle and to be UTF-8.
fn text_of(bytes: &[u8], text: Text) -> &str {
    let bytes = bytes.get(text.start as usize..(text.start + text.len) as usize);
    bytes.and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or_default()
}

/// Reads a pickle. Fails with what is wrong and where.
pub(super) fn read(bytes: &[u8]) -> Result<Pickle<'_>, String> {
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("a pickle of {} bytes, expected at most {MAX_BYTES}", bytes.len()));
    }
    let mut machine = Machine {
        bytes,
        at: 0,
        nodes: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        items: 0,
    };
    loop {
        let at = machine.at;
        match machine.step() {
            Ok(None) => {}
            Ok(Some(root)) => return Ok(Pickle { bytes, nodes: machine.nodes, root }),
            Err(what) => return Err(format!("pickle, byte {at}: {what}")),
        }
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    /// The next byte.
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Value>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    items: usize,
}

type Step<T = ()> = Result<T, String>;

impl<'a> Machine<'a> {
    /// Runs one instruction; gives the result at the last.
    fn step(&mut self) -> Step<Option<Value>> {
        let [op] = self.take()?;
        match op {
            b'.' => return self.pop().map(Some),
            0x80 => match self.take()? {
                [2..=5] => {}
                [version] => return Err(format!("protocol {version}, expected 2 to 5")),
            },
            // The length of what follows, which only helps who reads from a socket.
            0x95 => drop(self.take::<8>()?),
            b'(' => {
                self.charge(1)?;
                self.marks.push(self.stack.len());
            }

            b'N' | 0x88 | 0x89 => self.push(Value::Other)?,
            b'G' => {
                self.take::<8>()?;
                self.push(Value::Other)?;
            }
            b'J' => {
                let number = i32::from_le_bytes(self.take()?);
                self.push(Value::Int(number.into()))?;
            }
            b'K' => {
                let [number] = self.take()?;
                self.push(Value::Int(number.into()))?;
            }
            b'M' => {
                let number = u16::from_le_bytes(self.take()?);
                self.push(Value::Int(number.into()))?;
            }
            0x8a => self.long()?,

            b'X' => {
                let len = u32::from_le_bytes(self.take()?);
                self.text(len.into())?;
            }
            0x8c => {
                let [len] = self.take()?;
                self.text(len.into())?;
            }
            0x8d => {
                let len = u64::from_le_bytes(self.take()?);
                self.text(len)?;
            }
            b'B' => {
                let len = u32::from_le_bytes(self.take()?);
                self.skip(len.into())?;
            }
            b'C' => {
                let [len] = self.take()?;
                self.skip(len.into())?;
            }
            0x8e => {
                let len = u64::from_le_bytes(self.take()?);
                self.skip(len)?;
            }

            b'}' => self.make(Node::Dict(Vec::new()))?,
            b']' => self.make(Node::List(Vec::new()))?,
            b')' => self.make(Node::Tuple(Vec::new()))?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.make(Node::Tuple(items))?;
            }
            op @ 0x85..=0x87 => {
                let items = self.pop_many(usize::from(op - 0x84))?;
                self.make(Node::Tuple(items))?;
            }
            b's' => {
                let items = self.pop_many(2)?;
                self.set_items(items)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(items)?;
            }
            b'a' => {
                let items = self.pop_many(1)?;
                self.append(items)?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }

            b'q' => {
                let [index] = self.take()?;
                self.remember(index.into())?;
            }
            b'r' => {
                let index = u32::from_le_bytes(self.take()?);
                self.remember(index)?;
            }
            0x94 => self.remember(self.memo.len() as u32)?,
            b'h' => {
                let [index] = self.take()?;
                self.recall(index.into())?;
            }
            b'j' => {
                let index = u32::from_le_bytes(self.take()?);
                self.recall(index)?;
            }

            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(module), Value::Text(name)) = (module, name) else {
                    return Err("a global whose name is no text".to_owned());
                };
                let (module, name) = (text_of(self.bytes, module), text_of(self.bytes, name));
                self.global(module, name)?;
            }
            b'R' => {
                let (args, function) = (self.pop()?, self.pop()?);
                let value = self.call(function, args)?;
                self.push(value)?;
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.make(Node::Storage(storage))?;
            }
            b'b' => {
                // The state of a dict's own attributes, such as `_metadata`.
                self.pop()?;
                if !matches!(self.top_node()?, Node::Dict(_)) {
                    return Err("the state of something that is no dict".to_owned());
                }
            }
            op => return Err(format!("instruction {op:#04x}, which no dict of tensors needs")),
        }
        Ok(None)
    }

    fn take<const N: usize>(&mut self) -> Step<[u8; N]> {
        let bytes = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk());
        self.at += N;
        bytes.copied().ok_or_else(|| "it is cut short".to_owned())
    }

    /// The start of the next `len` bytes, which are passed over.
    fn advance(&mut self, len: u64) -> Step<usize> {
        let start = self.at;
        let rest = self.bytes.len().saturating_sub(start);
        match usize::try_from(len) {
            Ok(len) if len <= rest => {
                self.at += len;
                Ok(start)
            }
            _ => Err(format!("{len} bytes are announced and {rest} are left")),
        }
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let len = rest.iter().position(|b| *b == b'\n').ok_or("a global's name that does not end")?;
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| "a global's name that is no UTF-8".to_owned())
    }

    fn text(&mut self, len: u64) -> Step {
        let start = self.advance(len)?;
        if std::str::from_utf8(&self.bytes[start..self.at]).is_err() {
            return Err("a text that is no UTF-8".to_owned());
        }
        self.push(Value::Text(Text { start: start as u32, len: len as u32 }))
    }

    fn skip(&mut self, len: u64) -> Step {
        self.advance(len)?;
        self.push(Value::Other)
    }

    fn long(&mut self) -> Step {
        let [len] = self.take()?;
        let start = self.advance(len.into())?;
        let bytes = &self.bytes[start..self.at];
        let mut number = [if bytes.last().is_some_and(|b| *b > 0x7f) { 0xff } else { 0 }; 8];
        let Some(low) = number.get_mut(..bytes.len()) else {
            return self.push(Value::Other); // No size is that large.
        };
        low.copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(number)))
    }

    fn charge(&mut self, items: usize) -> Step {
        self.items += items;
        match self.items > MAX_ITEMS {
            true => Err(format!("more than {MAX_ITEMS} values")),
            false => Ok(()),
        }
    }

    fn push(&mut self, value: Value) -> Step {
        if self.stack.len() == MAX_STACK {
            return Err(format!("more than {MAX_STACK} values on the stack"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn make(&mut self, node: Node) -> Step {
        let items = match &node {
            Node::Tuple(items) => items.len(),
            _ => 0,
        };
        self.charge(2 + items)?;
        self.nodes.push(node);
        self.push(Value::Node(self.nodes.len() as u32 - 1))
    }

    fn pop(&mut self) -> Step<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("a value is taken off an empty stack".to_owned());
        }
        self.stack.pop().ok_or_else(|| "a value is taken off an empty stack".to_owned())
    }

    fn pop_many(&mut self, count: usize) -> Step<Vec<Value>> {
        let mut items = (0..count).map(|_| self.pop()).collect::<Step<Vec<_>>>()?;
        items.reverse();
        Ok(items)
    }

    fn pop_to_mark(&mut self) -> Step<Vec<Value>> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        Ok(self.stack.split_off(mark))
    }

    fn top_node(&mut self) -> Step<&mut Node> {
        match self.stack.last() {
            Some(Value::Node(index)) => Ok(&mut self.nodes[*index as usize]),
            _ => Err("something that has no parts is given some".to_owned()),
        }
    }

    fn set_items(&mut self, items: Vec<Value>) -> Step {
        self.charge(items.len())?;
        let (pairs, []) = items.as_chunks::<2>() else { return Err("a key without a value".to_owned()) };
        match self.top_node()? {
            Node::Dict(dict) => dict.extend(pairs.iter().map(|[key, value]| (*key, *value))),
            _ => return Err("something that is no dict is given keys".to_owned()),
        }
        Ok(())
    }

    fn append(&mut self, items: Vec<Value>) -> Step {
        self.charge(items.len())?;
        match self.top_node()? {
            Node::List(list) => list.extend(items),
            _ => return Err("something that is no list is given items".to_owned()),
        }
        Ok(())
    }

    fn remember(&mut self, index: u32) -> Step {
        self.charge(4)?;
        let value = *self.stack.last().ok_or("nothing is there to be remembered")?;
        self.memo.insert(index, value);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Step {
        let value = *self.memo.get(&index).ok_or("something is recalled that was never remembered")?;
        self.push(value)
    }

    fn global(&mut self, module: &str, name: &str) -> Step {
        let global = Global::find(module, name).ok_or_else(|| {
            let global: String = format!("{module}.{name}").chars().take(MAX_LISTED_CHARS).collect();
            format!("the global `{global}`, which no dict of tensors needs; it was not run")
        })?;
        self.push(Value::Global(global))
    }

    fn tuple(&self, value: Value) -> Step<&[Value]> {
        match value {
            Value::Node(index) => match &self.nodes[index as usize] {
                Node::Tuple(items) => Ok(items),
                _ => Err("a list of arguments that is no tuple".to_owned()),
            },
            _ => Err("a list of arguments that is no tuple".to_owned()),
        }
    }

    fn sizes(&self, value: Value) -> Step<Vec<usize>> {
        let items = self.tuple(value)?;
        if items.len() > crate::weights::MAX_RANK {
            return Err(format!("a tensor of {} dimensions", items.len()));
        }
        items.iter().map(|item| self.size(*item)).collect()
    }

    fn size(&self, value: Value) -> Step<usize> {
        match value {
            Value::Int(size) => usize::try_from(size).map_err(|_| format!("a size of {size}")),
            _ => Err("a size that is no number".to_owned()),
        }
    }

    fn call(&mut self, function: Value, args: Value) -> Step<Value> {
        let Value::Global(function) = function else {
            return Err("a call of something that is no function".to_owned());
        };
        let args = self.tuple(args)?;
        match (function, args) {
            (Global::OrderedDict, []) => {
                self.charge(2)?;
                self.nodes.push(Node::Dict(Vec::new()));
            }
            (Global::Size, [sizes]) => return Ok(*sizes),
            (Global::RebuildParameter, [tensor, ..]) => return Ok(*tensor),
            (Global::RebuildTensor, [storage, offset, shape, strides, ..]) => {
                let tensor = self.tensor(*storage, None, (*offset, *shape, *strides))?;
                self.charge(8)?;
                self.nodes.push(Node::Tensor(tensor));
            }
            (Global::RebuildTensorV3, [storage, offset, shape, strides, _, _, dtype, ..]) => {
                let Value::Global(Global::Dtype(dtype)) = *dtype else {
                    return Err("a tensor whose dtype is none".to_owned());
                };
                let tensor = self.tensor(*storage, Some(dtype), (*offset, *shape, *strides))?;
                self.charge(8)?;
                self.nodes.push(Node::Tensor(tensor));
            }
            (function, args) => return Err(format!("a call of {function:?} with {} arguments", args.len())),
        }
        Ok(Value::Node(self.nodes.len() as u32 - 1))
    }

    fn tensor(&self, storage: Value, dtype: Option<Dtype>, view: (Value, Value, Value)) -> Step<Tensor> {
        let storage = match storage {
            Value::Node(index) => match &self.nodes[index as usize] {
                Node::Storage(storage) => *storage,
                _ => return Err("a tensor of something that is no storage".to_owned()),
            },
            _ => return Err("a tensor of something that is no storage".to_owned()),
        };
        let dtype = dtype.or(storage.dtype).ok_or("a tensor without a dtype")?;
        let (offset, shape, strides) = view;
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        if shape.len() != strides.len() {
            return Err(format!("a tensor of {} dimensions and {} strides", shape.len(), strides.len()));
        }
        Ok(Tensor { storage, dtype, offset: self.size(offset)? as u64, shape, strides })
    }

    /// What `('storage', class, key, location, length)` names.
    fn storage(&self, id: Value) -> Step<Storage> {
        match self.tuple(id)? {
            [
                Value::Text(tag),
                Value::Global(Global::Storage(dtype)),
                Value::Text(key),
                Value::Text(_),
                len,
                ..,
            ] if text_of(self.bytes, *tag) == "storage" => {
                Ok(Storage { dtype: *dtype, key: *key, len: self.size(*len)? as u64 })
            }
            _ => Err("something outside of the pickle that is no storage".to_owned()),
        }
    }
}
