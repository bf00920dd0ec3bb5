//! JSON values → Rust values, each within the range that its field's [`Kind`] states. Every error says which
//! field, what it was and what was expected.

use serde_json::Value;

use super::fields::{Kind, NAME_CHARS, PROMPT_CHARS};
use super::{BBox, Size};
use crate::{Error, ErrorKind, Result};

/// Largest row or column of a box.
const MAX_PIXEL: u64 = 65_535;

/// An error about the field `name`, which `is` something else than `expected`.
pub(super) fn wrong(name: &str, is: &str, expected: &str) -> Error {
    let message = format!("`{name}` is {is}, expected {expected}");
    Error::new(ErrorKind::InvalidInput, message).with_reason("INVALID_FIELD")
}

/// What `value` is, short enough for a message.
pub(super) fn describe(value: &Value) -> String {
    const SHOWN: usize = 40;
    match value {
        Value::Array(_) => "an array".to_string(),
        Value::Object(_) => "an object".to_string(),
        Value::String(text) if text.chars().count() > SHOWN => {
            format!("{:?}…", text.chars().take(SHOWN).collect::<String>())
        }
        other => other.to_string(),
    }
}

/// The integer of a [`Kind::Integer`] or [`Kind::Frames`].
pub(super) fn integer(name: &str, kind: Kind, value: &Value) -> Result<i64> {
    let (min, max, frames) = match kind {
        Kind::Integer { min, max } => (min, max, false),
        Kind::Frames { min, max } => (min, max, true),
        _ => return Err(mismatch(name)),
    };
    let n = value.as_i64().filter(|n| (min..=max).contains(n));
    match n {
        Some(n) if frames && n % 4 != 1 => {
            let near = ((n + 2) / 4 * 4 + 1).clamp(min, max);
            Err(wrong(name, &n.to_string(), &format!("4n+1 (for example {near})")))
        }
        Some(n) => Ok(n),
        None if frames => Err(wrong(name, &describe(value), &format!("4n+1 from {min} to {max}"))),
        None => Err(wrong(name, &describe(value), &format!("an integer from {min} to {max}"))),
    }
}

/// The number of a [`Kind::Number`].
pub(super) fn number(name: &str, kind: Kind, value: &Value) -> Result<f64> {
    let Kind::Number { min, max } = kind else { return Err(mismatch(name)) };
    let n = value.as_f64().filter(|n| (min..=max).contains(n));
    n.ok_or_else(|| wrong(name, &describe(value), &format!("a number from {min} to {max}")))
}

/// The value of a [`Kind::Flag`].
pub(super) fn flag(name: &str, value: &Value) -> Result<bool> {
    value.as_bool().ok_or_else(|| wrong(name, &describe(value), "true or false"))
}

/// The text of a [`Kind::Text`], without white space at its ends; `None` when nothing is left.
pub(super) fn text(name: &str, kind: Kind, value: &Value) -> Result<Option<String>> {
    let Kind::Text(most) = kind else { return Err(mismatch(name)) };
    let text = value.as_str().ok_or_else(|| wrong(name, &describe(value), "text"))?.trim();
    let chars = text.chars().count();
    if chars > most {
        let e = wrong(name, &format!("{chars} characters long"), &format!("at most {most}"));
        let reason = if most == PROMPT_CHARS { "PROMPT_TOO_LONG" } else { "TEXT_TOO_LONG" };
        return Err(e.with_reason(reason));
    }
    Ok((!text.is_empty()).then(|| text.to_string()))
}

/// The word of a [`Kind::Name`].
pub(super) fn word(name: &str, value: &Value) -> Result<String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    match value.as_str() {
        Some(word) if (1..=NAME_CHARS).contains(&word.len()) && word.bytes().all(allowed) => {
            Ok(word.to_string())
        }
        _ => {
            let expected = format!("1 to {NAME_CHARS} letters, digits, `.`, `_` or `-`");
            Err(wrong(name, &describe(value), &expected))
        }
    }
}

/// The canonical value of a [`Kind::Choice`].
pub(super) fn choice(name: &str, kind: Kind, value: &Value) -> Result<&'static str> {
    let Kind::Choice { values, synonyms } = kind else { return Err(mismatch(name)) };
    let given = match value {
        Value::String(text) => text.trim().to_ascii_lowercase(),
        Value::Number(n) => n.to_string(),
        _ => String::new(),
    };
    let known = values.iter().find(|v| **v == given);
    let known = known.or_else(|| synonyms.iter().find(|(from, _)| *from == given).map(|(_, to)| to));
    known.copied().ok_or_else(|| {
        let listed: Vec<String> = values.iter().map(|v| format!("`{v}`")).collect();
        wrong(name, &describe(value), &format!("one of {}", listed.join(", ")))
    })
}

/// A size bucket by its name or as `WIDTHxHEIGHT` in pixels; `true` when it was snapped.
pub(super) fn size(name: &str, kind: Kind, value: &Value) -> Result<(Size, bool)> {
    let pixels = value.as_str().and_then(|text| text.trim().split_once(['x', 'X', '*', '×']));
    if let Some((width, height)) = pixels {
        let side = |text: &str| text.trim().parse().ok().filter(|n| (64..=8192).contains(n));
        let sides = side(width).zip(side(height));
        let (width, height) = sides.ok_or_else(|| {
            wrong(name, &describe(value), "`480p`, `720p` or WIDTHxHEIGHT with sides from 64 to 8192")
        })?;
        return Ok((Size::snap(width, height), true));
    }
    Ok((if choice(name, kind, value)? == "720p" { Size::P720 } else { Size::P480 }, false))
}

/// Two boxes, as `{"person1": box, "person2": box}` or `[box, box]`.
pub(super) fn boxes(name: &str, value: &Value) -> Result<[BBox; 2]> {
    let two = match value {
        Value::Object(map) if map.len() == 2 => map.get("person1").zip(map.get("person2")),
        Value::Array(items) if items.len() == 2 => items.first().zip(items.get(1)),
        _ => None,
    };
    let Some((first, second)) = two else {
        return Err(wrong(name, &describe(value), "{\"person1\": box, \"person2\": box}"));
    };
    Ok([bbox(&format!("{name}.person1"), first)?, bbox(&format!("{name}.person2"), second)?])
}

fn bbox(name: &str, value: &Value) -> Result<BBox> {
    let sides: Option<Vec<u32>> = value.as_array().and_then(|sides| {
        let side = |v: &Value| v.as_u64().filter(|n| *n <= MAX_PIXEL).and_then(|n| u32::try_from(n).ok());
        sides.iter().map(side).collect()
    });
    match sides.as_deref() {
        Some(&[row_min, col_min, row_max, col_max]) if row_min < row_max && col_min < col_max => {
            Ok(BBox { row_min, col_min, row_max, col_max })
        }
        Some(&[row_min, col_min, row_max, col_max]) => {
            let is = format!("[{row_min}, {col_min}, {row_max}, {col_max}]");
            Err(wrong(name, &is, "row_min < row_max and column_min < column_max"))
        }
        _ => {
            let expected =
                format!("[row_min, column_min, row_max, column_max], integers from 0 to {MAX_PIXEL}");
            Err(wrong(name, &describe(value), &expected))
        }
    }
}

/// The table names one kind for a field and the parser reads it as another: a defect of ours, which a test of
/// every field excludes.
fn mismatch(name: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("`{name}` cannot be read"))
}
