//! `$NAME` and `${NAME}` in the registry's text, replaced by what whoever reads the registry knows under that name: the
//! library itself reads no environment.

use std::borrow::Cow;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::parse::{Checked, Failure};

/// Looks up the value of a variable.
pub(super) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Keys of text for people and models, in which a dollar sign is one.
const PROSE: [&str; 3] = ["description", "prompt", "negative_prompt"];

/// Expands every text of `table` but prose.
pub(super) fn table(table: &mut DeTable<'_>, lookup: Lookup) -> Checked<()> {
    for (key, entry) in table.iter_mut() {
        if !PROSE.contains(&key.get_ref().as_ref()) {
            value(entry, lookup)?;
        }
    }
    Ok(())
}

fn value(entry: &mut Spanned<DeValue<'_>>, lookup: Lookup) -> Checked<()> {
    let span = entry.span();
    match entry.get_mut() {
        DeValue::String(written) if written.contains('$') => {
            let expanded = text(written, lookup).map_err(|message| Failure::new(span, message))?;
            *written = Cow::Owned(expanded);
            Ok(())
        }
        DeValue::Array(entries) => entries.iter_mut().try_for_each(|entry| value(entry, lookup)),
        DeValue::Table(entries) => table(entries, lookup),
        _ => Ok(()),
    }
}

fn text(written: &str, lookup: Lookup) -> Result<String, String> {
    let mut expanded = String::with_capacity(written.len());
    let mut rest = written;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let (name, after) = match after.strip_prefix('{') {
            Some(after) => after.split_once('}').unwrap_or_default(),
            None => after.split_at(after.find(|c| !is_name(c)).unwrap_or(after.len())),
        };
        if name.is_empty() || !name.chars().all(is_name) {
            return Err(format!("{written:?} has a `$` without a name, expected $NAME or ${{NAME}}"));
        }
        // An empty variable is one that is not set: compose files pass those on.
        let value = lookup(name).filter(|value| !value.is_empty());
        expanded += &value.ok_or_else(|| format!("`${name}` is not set, which {written:?} needs"))?;
        rest = after;
    }
    expanded.push_str(rest);
    Ok(expanded)
}
