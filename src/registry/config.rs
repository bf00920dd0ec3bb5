//! A network's architecture: the name of a checkpoint that is built in, or a table of dimensions.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};

use super::strict::StrictMap;
use crate::media::image::Buckets;
use crate::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};

/// A name and what makes the value that it stands for.
pub type Named<C> = (&'static str, fn() -> C);

/// A type with values that have names.
pub trait NamedConfig: DeserializeOwned + 'static {
    /// Each name with its value.
    const NAMED: &'static [Named<Self>];
}

impl NamedConfig for wan::Config {
    const NAMED: &'static [Named<Self>] = &[("infinitetalk_14b", Self::infinitetalk_14b)];
}

impl NamedConfig for wan_vae::Config {
    const NAMED: &'static [Named<Self>] = &[("wan2_1", Self::wan2_1)];
}

impl NamedConfig for umt5::Config {
    const NAMED: &'static [Named<Self>] = &[("umt5_xxl", Self::umt5_xxl)];
}

impl NamedConfig for clip_vision::Config {
    const NAMED: &'static [Named<Self>] = &[("vit_h_14", Self::vit_h_14)];
}

impl NamedConfig for wav2vec2::Config {
    const NAMED: &'static [Named<Self>] = &[("chinese_base", Self::chinese_base)];
}

impl NamedConfig for Buckets {
    const NAMED: &'static [Named<Self>] =
        &[("infinitetalk-480", Self::infinitetalk_480), ("infinitetalk-720", Self::infinitetalk_720)];
}

/// Reads a name of `C`, or a table in which a key that `C` does not know is an error.
pub(super) fn name_or_table<'de, C: NamedConfig, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<C, D::Error> {
    deserializer.deserialize_any(NameOrTable(PhantomData))
}

struct NameOrTable<C>(PhantomData<C>);

impl<'de, C: NamedConfig> Visitor<'de> for NameOrTable<C> {
    type Value = C;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let names: Vec<_> = C::NAMED.iter().map(|(name, _)| format!("{name:?}")).collect();
        write!(f, "{} or a table", names.join(", "))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<C, E> {
        match C::NAMED.iter().find(|(name, _)| *name == value) {
            Some((_, config)) => Ok(config()),
            None => Err(E::invalid_value(serde::de::Unexpected::Str(value), &self)),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<C, A::Error> {
        C::deserialize(MapAccessDeserializer::new(StrictMap::new(map)))
    }
}
