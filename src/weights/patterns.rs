//! Name patterns of the registry: `*` stands for any run of characters, dots included.

/// Whether `name` fits any of `patterns`.
pub(super) fn matches_any<S: AsRef<str>>(patterns: &[S], name: &str) -> bool {
    patterns.iter().any(|pattern| matches(pattern.as_ref(), name))
}

/// Whether `name` fits `pattern`. Each literal part is taken at its first place, which is enough because only the
/// last part is bound to the end.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(first) else { return false };
    let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
    for part in middle.split('*') {
        let Some(at) = name.find(part) else { return false };
        name = &name[at + part.len()..];
    }
    name.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_run_and_the_rest_is_literal() {
        for (pattern, name) in [
            ("log_scale", "log_scale"),
            ("textual.*", "textual.token_embedding.weight"),
            ("*.input_scale", "blocks.0.ffn.0.input_scale"),
            ("visual.*.31.*.bias", "visual.transformer.31.norm1.bias"),
            ("a*a*a", "aaa"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("log_scale", "log_scale.weight"),
            ("textual.*", "visual.textual."),
            ("*.input_scale", "input_scale_2"),
            ("visual.*.31.*.bias", "visual.transformer.31.bias"),
            ("a*a*a", "aa"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }
}
