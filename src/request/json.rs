//! JSON from outside: like `serde_json`, and strict where it is silent. A name given twice is an error here,
//! since keeping the last one would make the video of a request that nobody meant to send.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::{Error, ErrorKind, Result};

/// Reads one JSON document. Nesting deeper than 128 is refused, as are numbers beyond f64, text after the
/// document, text that is not UTF-8 and an object with the same name twice.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] with reason `INVALID_JSON` or `DUPLICATE_FIELD`; the message quotes nothing
/// of the document but the name that occurs twice.
pub fn read_json(text: &[u8]) -> Result<Value> {
    serde_json::from_slice::<Strict>(text).map(|v| v.0).map_err(|e| {
        let duplicate = e.to_string().starts_with(DUPLICATE);
        let reason = if duplicate { "DUPLICATE_FIELD" } else { "INVALID_JSON" };
        Error::new(ErrorKind::InvalidInput, format!("the request is not valid JSON: {e}")).with_reason(reason)
    })
}

const DUPLICATE: &str = "the name";

/// A value whose objects have each name once.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Strict(item)) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            if fields.contains_key(&name) {
                let shown: String = name.chars().take(60).collect();
                return Err(de::Error::custom(format_args!("{DUPLICATE} `{shown}` occurs twice")));
            }
            let Strict(value) = map.next_value()?;
            fields.insert(name, value);
        }
        Ok(Value::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_documents_read_as_serde_json_reads_them() {
        let text = r#"{"a": [1, -2, 3.5, "ü\n", null, true, {}], "b": {"a": 18446744073709551615}}"#;
        assert_eq!(read_json(text.as_bytes()).unwrap(), serde_json::from_str::<Value>(text).unwrap());
    }

    #[test]
    fn broken_documents_are_refused() {
        let deep = "[".repeat(100_000);
        for (text, reason) in [
            (&b""[..], "INVALID_JSON"),
            (b"{\"a\":1", "INVALID_JSON"),
            (b"{\"a\":1,}", "INVALID_JSON"),
            (b"{} {}", "INVALID_JSON"),
            (b"\xef\xbb\xbf{}", "INVALID_JSON"),
            (b"{\"a\":\"\0\"}", "INVALID_JSON"),
            (b"{\"a\":\"\xff\"}", "INVALID_JSON"),
            (b"{\"a\":1e999}", "INVALID_JSON"),
            (b"{\"a\":NaN}", "INVALID_JSON"),
            (b"{\"a\":\"\\ud800\"}", "INVALID_JSON"),
            (deep.as_bytes(), "INVALID_JSON"),
            (b"{\"a\":1,\"a\":1}", "DUPLICATE_FIELD"),
            (b"{\"x\":[{\"a\":1,\"b\":2,\"a\":3}]}", "DUPLICATE_FIELD"),
        ] {
            let e = read_json(text).unwrap_err();
            assert_eq!((e.kind(), e.reason()), (ErrorKind::InvalidInput, Some(reason)), "{e}");
        }
    }
}
