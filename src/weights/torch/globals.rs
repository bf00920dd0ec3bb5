//! The few things outside of a pickle that it may name.

use safetensors::Dtype;

/// The functions and classes that a pickle may name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    /// Of a storage with a dtype, or of one without.
    RebuildTensor,
    /// Of a storage without a dtype, which is an argument.
    RebuildTensorV3,
    RebuildParameter,
    Size,
    Dtype(Dtype),
    /// A class of storages; `None` for bytes without a dtype.
    Storage(Option<Dtype>),
}

impl Global {
    /// What `module.name` is, if a dict of tensors needs it.
    pub(super) fn find(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_tensor_v3") => Self::RebuildTensorV3,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "Size") => Self::Size,
            ("torch" | "torch.storage", "UntypedStorage") => Self::Storage(None),
            ("torch", name) => match name.strip_suffix("Storage") {
                Some(name) => Self::Storage(Some(storage_dtype(name)?)),
                None => Self::Dtype(dtype(name)?),
            },
            _ => return None,
        })
    }
}

/// The dtype of `torch.<name>Storage`.
fn storage_dtype(name: &str) -> Option<Dtype> {
    Some(match name {
        "Double" => Dtype::F64,
        "Float" => Dtype::F32,
        "Half" => Dtype::F16,
        "BFloat16" => Dtype::BF16,
        "Long" => Dtype::I64,
        "Int" => Dtype::I32,
        "Short" => Dtype::I16,
        "Char" => Dtype::I8,
        "Byte" => Dtype::U8,
        "Bool" => Dtype::BOOL,
        _ => return None,
    })
}

/// The dtype `torch.<name>`.
fn dtype(name: &str) -> Option<Dtype> {
    Some(match name {
        "float64" => Dtype::F64,
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        "int64" => Dtype::I64,
        "uint64" => Dtype::U64,
        "int32" => Dtype::I32,
        "uint32" => Dtype::U32,
        "int16" => Dtype::I16,
        "uint16" => Dtype::U16,
        "int8" => Dtype::I8,
        "uint8" => Dtype::U8,
        "bool" => Dtype::BOOL,
        _ => return None,
    })
}
