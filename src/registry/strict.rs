//! Refuses keys that a type ignores. The networks' configs ignore what they do not know, because the reference's
//! config files hold more than the networks need; in the registry such a key is a typing mistake.

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};

/// A map whose reader may not ignore a key.
pub(super) struct StrictMap<A> {
    inner: A,
    key: String,
}

impl<A> StrictMap<A> {
    pub(super) fn new(inner: A) -> Self {
        Self { inner, key: String::new() }
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for StrictMap<A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        let Some(key) = self.inner.next_key::<String>()? else { return Ok(None) };
        self.key = key;
        seed.deserialize(serde::de::value::StrDeserializer::new(&self.key)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.inner.next_value_seed(Strict { inner: seed, key: &self.key })
    }
}

/// The seed, then the deserializer, of the value of `key`.
struct Strict<'a, T> {
    inner: T,
    key: &'a str,
}

impl<'de, V: DeserializeSeed<'de>> DeserializeSeed<'de> for Strict<'_, V> {
    type Value = V::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        self.inner.deserialize(Strict { inner: deserializer, key: self.key })
    }
}

/// Methods that go to the inner deserializer as they are.
macro_rules! forward {
    ($($method:ident($($arg:ident: $type:ty),*))*) => {$(
        fn $method<V: Visitor<'de>>(self, $($arg: $type,)* visitor: V) -> Result<V::Value, D::Error> {
            self.inner.$method($($arg,)* visitor)
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Strict<'_, D> {
    type Error = D::Error;

    fn deserialize_ignored_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, D::Error> {
        Err(D::Error::custom(format!("unknown field `{}`", self.key)))
    }

    forward! {
        deserialize_any() deserialize_bool() deserialize_char() deserialize_str() deserialize_string()
        deserialize_i8() deserialize_i16() deserialize_i32() deserialize_i64()
        deserialize_u8() deserialize_u16() deserialize_u32() deserialize_u64()
        deserialize_f32() deserialize_f64() deserialize_bytes() deserialize_byte_buf()
        deserialize_option() deserialize_unit() deserialize_seq() deserialize_map() deserialize_identifier()
        deserialize_unit_struct(name: &'static str)
        deserialize_newtype_struct(name: &'static str)
        deserialize_tuple(len: usize)
        deserialize_tuple_struct(name: &'static str, len: usize)
        deserialize_struct(name: &'static str, fields: &'static [&'static str])
        deserialize_enum(name: &'static str, variants: &'static [&'static str])
    }
}
