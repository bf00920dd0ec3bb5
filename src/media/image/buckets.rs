//! The sizes a video may have, chosen by the shape of the portrait.

use serde::de::{Deserialize, Deserializer, Error as _};
use serde::ser::{Serialize, Serializer};
use std::collections::BTreeMap;

/// Height and width in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

/// One allowed size and the shape (height / width) it stands for.
#[derive(Clone, Debug, PartialEq)]
pub struct Bucket {
    /// The shape as it is written in the table, such as `0.67`.
    pub key: String,
    /// The size of the video.
    pub size: Size,
    ratio: f64,
}

/// A table of allowed sizes, in the order of their shapes.
///
/// It is read from tables such as `{"0.67" = [512, 768], "1.00" = [640, 640]}`: height / width of the
/// portrait → height and width of the video.
#[derive(Clone, Debug, PartialEq)]
pub struct Buckets(Vec<Bucket>);

/// `bucket_config.py` of MeiGen-AI/InfiniteTalk at 0107cd9, `ASPECT_RATIO_627`: about 640 × 640 pixels.
const INFINITETALK_480: &[(&str, usize, usize)] = &[
    ("0.26", 320, 1216),
    ("0.38", 384, 1024),
    ("0.50", 448, 896),
    ("0.67", 512, 768),
    ("0.82", 576, 704),
    ("1.00", 640, 640),
    ("1.22", 704, 576),
    ("1.50", 768, 512),
    ("1.86", 832, 448),
    ("2.00", 896, 448),
    ("2.50", 960, 384),
    ("2.83", 1088, 384),
    ("3.60", 1152, 320),
    ("3.80", 1216, 320),
    ("4.00", 1280, 320),
];

/// `bucket_config.py` of MeiGen-AI/InfiniteTalk at 0107cd9, `ASPECT_RATIO_960`: about 960 × 960 pixels.
const INFINITETALK_720: &[(&str, usize, usize)] = &[
    ("0.22", 448, 2048),
    ("0.29", 512, 1792),
    ("0.36", 576, 1600),
    ("0.45", 640, 1408),
    ("0.55", 704, 1280),
    ("0.63", 768, 1216),
    ("0.76", 832, 1088),
    ("0.88", 896, 1024),
    ("1.00", 960, 960),
    ("1.14", 1024, 896),
    ("1.31", 1088, 832),
    ("1.50", 1152, 768),
    ("1.58", 1216, 768),
    ("1.82", 1280, 704),
    ("1.91", 1344, 704),
    ("2.20", 1408, 640),
    ("2.30", 1472, 640),
    ("2.67", 1536, 576),
    ("2.89", 1664, 576),
    ("3.62", 1856, 512),
    ("3.75", 1920, 512),
];

impl Buckets {
    /// The table of `infinitetalk-480`.
    pub fn infinitetalk_480() -> Self {
        Self::of(INFINITETALK_480)
    }

    /// The table of `infinitetalk-720`.
    pub fn infinitetalk_720() -> Self {
        Self::of(INFINITETALK_720)
    }

    fn of(table: &[(&str, usize, usize)]) -> Self {
        let bucket = |&(key, height, width): &(&str, usize, usize)| {
            // The constants above are numbers; a test reads them all.
            let ratio = key.parse().unwrap_or(f64::NAN);
            Bucket { key: key.to_owned(), size: Size { height, width }, ratio }
        };
        Self(table.iter().map(bucket).collect())
    }

    /// The bucket whose shape is nearest to that of a portrait of `source`; the flatter one of two equally
    /// near ones.
    pub fn choose(&self, source: Size) -> &Bucket {
        let ratio = source.height as f64 / source.width as f64;
        let distance = |bucket: &Bucket| (bucket.ratio - ratio).abs();
        let (first, rest) = self.0.split_first().expect("a table has at least one bucket");
        rest.iter().fold(first, |best, bucket| if distance(bucket) < distance(best) { bucket } else { best })
    }

    /// All buckets in the order of their shapes.
    pub fn iter(&self) -> impl Iterator<Item = &Bucket> {
        self.0.iter()
    }
}

impl<'de> Deserialize<'de> for Buckets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let table = BTreeMap::<String, [usize; 2]>::deserialize(deserializer)?;
        let mut buckets = Vec::with_capacity(table.len());
        for (key, [height, width]) in table {
            let ratio: f64 =
                key.parse().ok().filter(|ratio| *ratio > 0.0 && f64::is_finite(*ratio)).ok_or_else(|| {
                    D::Error::custom(format!(
                        "the bucket `{key}` is not named by height / width, such as `0.67`"
                    ))
                })?;
            if height == 0 || width == 0 || height % 16 != 0 || width % 16 != 0 {
                return Err(D::Error::custom(format!(
                    "the bucket `{key}` is {height}x{width}, expected multiples of 16"
                )));
            }
            buckets.push(Bucket { key, size: Size { height, width }, ratio });
        }
        if buckets.is_empty() {
            return Err(D::Error::custom("a table of size buckets is empty, expected at least one"));
        }
        buckets.sort_by(|a, b| a.ratio.total_cmp(&b.ratio));
        Ok(Self(buckets))
    }
}

impl Serialize for Buckets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|b| (&b.key, [b.size.height, b.size.width])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_tables_are_sound() {
        for table in [Buckets::infinitetalk_480(), Buckets::infinitetalk_720()] {
            assert!(table.iter().all(|b| b.ratio > 0.0 && b.size.height % 16 == 0 && b.size.width % 16 == 0));
            assert!(table.0.is_sorted_by(|a, b| a.ratio < b.ratio));
            // Written and read again it is the same table.
            let text = serde_json::to_string(&table).unwrap();
            assert_eq!(serde_json::from_str::<Buckets>(&text).unwrap(), table);
        }
    }

    #[test]
    fn the_nearest_shape_wins_and_ties_go_to_the_flatter() {
        let table: Buckets =
            toml::from_str("\"2.0\" = [64, 32]\n\"1.0\" = [48, 48]\n\"0.5\" = [32, 64]").unwrap();
        let key = |height, width| table.choose(Size { height, width }).key.as_str();
        assert_eq!((key(10, 10), key(30, 20), key(15, 20), key(1, 100)), ("1.0", "1.0", "0.5", "0.5"));
        assert_eq!(key(100, 1), "2.0");
    }

    #[test]
    fn unusable_tables_are_refused_by_name() {
        for (text, word) in
            [("{}", "empty"), (r#"{"wide":[16,16]}"#, "wide"), (r#"{"1.0":[20,16]}"#, "20x16")]
        {
            let error = serde_json::from_str::<Buckets>(text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
