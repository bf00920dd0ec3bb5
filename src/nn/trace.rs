//! Named intermediate tensors, for parity tests: networks [`record`] them, a test [`capture`]s them.
//! Outside of `capture`, recording costs one thread-local read.

use std::cell::RefCell;
use std::collections::BTreeMap;

use candle_core::Tensor;

thread_local! {
    static RECORD: RefCell<Option<BTreeMap<String, Tensor>>> = const { RefCell::new(None) };
}

/// Keeps `xs` under `name()` when a [`capture`] is running on this thread; a later record of the same name
/// replaces it.
pub fn record(name: impl FnOnce() -> String, xs: &Tensor) {
    RECORD.with_borrow_mut(|record| {
        if let Some(record) = record {
            record.insert(name(), xs.clone());
        }
    })
}

/// Keeps `xs` under `name.0`, the next of that name under `name.1`, and so on.
pub fn record_next(name: &str, xs: &Tensor) {
    RECORD.with_borrow_mut(|record| {
        if let Some(record) = record {
            let count = (0..).find(|i| !record.contains_key(&format!("{name}.{i}"))).unwrap_or(0);
            record.insert(format!("{name}.{count}"), xs.clone());
        }
    })
}

/// Runs `f` and returns what it recorded on this thread beside its result.
pub fn capture<T>(f: impl FnOnce() -> T) -> (T, BTreeMap<String, Tensor>) {
    RECORD.with_borrow_mut(|record| *record = Some(BTreeMap::new()));
    let out = f();
    (out, RECORD.with_borrow_mut(Option::take).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn nothing_is_kept_outside_of_a_capture() -> candle_core::Result<()> {
        let xs = Tensor::new(1f32, &Device::Cpu)?;
        record(|| unreachable!("the name is not even formatted"), &xs);
        let ((), kept) = capture(|| {
            record(|| "a".into(), &xs);
            record_next("b", &xs);
            record_next("b", &xs);
        });
        assert_eq!(kept.keys().collect::<Vec<_>>(), ["a", "b.0", "b.1"]);
        Ok(())
    }
}
