//! Prompt → the text that UMT5 was trained to see: entities decoded, mojibake repaired, typography made plain,
//! whitespace collapsed.
//!
//! Reference: `wan/modules/tokenizers.py` of MeiGen-AI/InfiniteTalk at 0107cd9, `basic_clean` and `whitespace_clean`:
//! `ftfy.fix_text` of ftfy 6.3, Python's `html.unescape` twice, every run of whitespace one space. The steps here
//! are ftfy's, in its order and with its tables.
//!
//! Where we differ: of the ten encodings as which ftfy tries to see text through, `mojibake` knows the two that
//! matter, Latin-1 and Windows-1252.

mod mojibake;

use std::borrow::Cow;

use unicode_normalization::UnicodeNormalization;

/// The cleaned form of `text`, on one line; empty when nothing remains.
pub fn clean(text: &str) -> String {
    let text = fix_text(text);
    let text = unescape_leniently(&unescape_leniently(&text));
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// ftfy's `fix_text` with its default settings: line by line, because lines may have been mangled differently.
fn fix_text(text: &str) -> String {
    let mut unescape = true;
    let mut fixed = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        // A `<` makes this markup, in which entities mean what they say, here and in all further lines.
        unescape &= !line.contains('<');
        fixed.push_str(&fix_line(line, unescape));
    }
    fixed
}

/// Applies all steps until none changes anything.
fn fix_line(line: &str, unescape: bool) -> String {
    let mut text = line.to_owned();
    loop {
        let mut fixed = text.clone();
        if unescape && !fixed.contains('<') {
            fixed = unescape_entities(&fixed);
        }
        fixed = mojibake::fix(fixed);
        fixed = mojibake::fix_c1_controls(&fixed);
        fixed = fixed.chars().flat_map(plain_characters).collect();
        fixed = fixed.replace("\r\n", "\n").replace(['\r', '\u{2028}', '\u{2029}', '\u{85}'], "\n");
        fixed = remove_terminal_escapes(&fixed);
        fixed.retain(|c| !is_unintended_control(c));
        fixed = fixed.nfc().collect();
        if fixed == text {
            return fixed;
        }
        text = fixed;
    }
}

/// Decodes entities that end with a semicolon, as ftfy does; names also in capitals, such as `&EACUTE;`.
fn unescape_entities(text: &str) -> String {
    /// Longest entity name that ftfy looks for.
    const MAX_NAME: usize = 24;
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('&') {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let number_sign = usize::from(rest[1..].starts_with('#'));
        let name = rest[1 + number_sign..].bytes().take_while(u8::is_ascii_alphanumeric).count();
        let end = 1 + number_sign + name;
        let entity = (1..=MAX_NAME).contains(&name) && rest[end..].starts_with(';');
        match entity.then(|| unescape_entity(&rest[..=end])).flatten() {
            Some(decoded) => {
                out.push_str(&decoded);
                rest = &rest[end + 1..];
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    out + rest
}

/// What the single `entity`, from `&` to `;`, stands for; `None` when it stands for nothing or for a part only.
fn unescape_entity(entity: &str) -> Option<String> {
    let whole = |entity: &str| {
        let decoded = htmlize::unescape(entity);
        (!decoded.ends_with(';') || entity == "&semi;").then(|| decoded.into_owned())
    };
    if let Some(decoded) = whole(entity) {
        return Some(drop_characters_python_drops(&decoded).into_owned());
    }
    let unknown = htmlize::unescape(entity) == entity;
    let capitals = !entity.starts_with("&#") && entity == entity.to_uppercase();
    (unknown && capitals)
        .then(|| whole(&entity.to_lowercase()))
        .flatten()
        .map(|decoded| decoded.to_uppercase())
}

/// Python's `html.unescape`: also entities without a semicolon.
fn unescape_leniently(text: &str) -> String {
    drop_characters_python_drops(&htmlize::unescape(text)).into_owned()
}

/// Numeric references to controls and non-characters are nothing in Python and themselves in the HTML standard.
fn drop_characters_python_drops(text: &str) -> Cow<'_, str> {
    let dropped = |c: char| {
        matches!(c, '\u{1}'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}' | '\u{fdd0}'..='\u{fdef}')
            || u32::from(c) & 0xfffe == 0xfffe
    };
    if text.contains(dropped) { text.replace(dropped, "").into() } else { text.into() }
}

/// The plain form of `c`: Latin ligatures and digraphs taken apart, full-width and half-width forms in standard
/// width, quotes straight.
fn plain_characters(c: char) -> impl Iterator<Item = char> {
    let string = match c {
        'Ĳ' => "IJ",
        'ĳ' => "ij",
        'ŉ' => "'n",
        'Ǳ' => "DZ",
        'ǲ' => "Dz",
        'ǳ' => "dz",
        'Ǆ' => "DŽ",
        'ǅ' => "Dž",
        'ǆ' => "dž",
        'Ǉ' => "LJ",
        'ǈ' => "Lj",
        'ǉ' => "lj",
        'Ǌ' => "NJ",
        'ǋ' => "Nj",
        'ǌ' => "nj",
        'ﬀ' => "ff",
        'ﬁ' => "fi",
        'ﬂ' => "fl",
        'ﬃ' => "ffi",
        'ﬄ' => "ffl",
        'ﬅ' => "ſt",
        'ﬆ' => "st",
        '\u{3000}' => " ",
        '\u{2bc}' | '\u{2018}'..='\u{201b}' => "'",
        '\u{201c}'..='\u{201f}' => "\"",
        _ => "",
    };
    let is_width_form = matches!(c, '\u{ff01}'..='\u{ffef}');
    let itself = (string.is_empty() && !is_width_form).then_some(c);
    let standard_width = is_width_form.then(|| std::iter::once(c).nfkc());
    string.chars().chain(itself).chain(standard_width.into_iter().flatten())
}

/// Removes "ANSI" sequences, such as those that colour a terminal: ESC, `[`, digits and semicolons, a letter.
fn remove_terminal_escapes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("\u{1b}[") {
        let sequence = &rest[start + 2..];
        let end = sequence.find(|c: char| !c.is_ascii_digit() && c != ';').unwrap_or(sequence.len());
        if sequence[end..].starts_with(|c: char| c.is_ascii_alphabetic()) {
            out.push_str(&rest[..start]);
            rest = &sequence[end + 1..];
        } else {
            out.push_str(&rest[..start + 2]);
            rest = sequence;
        }
    }
    out + rest
}

/// Controls without a use in text; those that make whitespace, join letters or set a direction stay.
fn is_unintended_control(c: char) -> bool {
    matches!(c,
        '\0'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}' // ASCII
        | '\u{206a}'..='\u{206f}' // deprecated Arabic
        | '\u{feff}' // byte order mark
        | '\u{fff9}'..='\u{fffc}' // annotations and the object replacement character
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn cleans(text: &str, expected: &str) {
        assert_eq!(clean(text), expected, "{text:?}");
    }

    // What is expected here was computed by ftfy 6.3.1 and Python's html module.

    #[test]
    fn whitespace_becomes_single_spaces() {
        cleans(
            "  A woman\u{a0} is\tsinging\r\n\r\n into\u{2029}a mic.\u{3000}",
            "A woman is singing into a mic.",
        );
        cleans("zero\u{200b}width \u{200d}joiner", "zero\u{200b}width \u{200d}joiner");
        cleans(" \n\t ", "");
    }

    #[test]
    fn entities_are_decoded_however_deep_unless_there_is_markup() {
        cleans("&amp;amp;amp;lt;b&gt;", "<b>");
        cleans("P&EACUTE;REZ &SZLIG; &nTILDE; &notit; &LTDOT;", "PÉREZ SS &nTILDE; ¬it; <DOT;");
        cleans("&#233;&#xE9;&#128;&#0;&#1;&#59;&semi;", "éé€\u{fffd};;");
        cleans("<i> &amp;amp;lt;", "<i> &lt;");
        cleans("<i>\n&amp;amp;lt;", "<i> &lt;");
        cleans("&amp;amp;lt;\n<i>", "< <i>");
        cleans("R&D, AT&T; fish & chips &", "R&D, AT&T; fish & chips &");
        cleans("1 &times 2 &copy2024", "1 × 2 ©2024");
    }

    #[test]
    fn typography_becomes_plain() {
        cleans("“a” ‘b’ ‛c‟ «d» …", "\"a\" 'b' 'c\" «d» …");
        cleans("ﬁne ﬂuﬃest ĳs ŉ ǅ æ œ", "fine fluffiest ijs 'n Dž æ œ");
        cleans("ＬＯＵＤ　Ｕﾀｰﾝ ￥", "LOUD Uターン ¥");
        cleans("e\u{301} A\u{30a}", "é Å");
    }

    #[test]
    fn controls_and_terminal_escapes_vanish() {
        cleans("a\u{7}b \u{1b}[36;44mblue\u{1b}[0m \u{1b}[12", "ab blue [12");
        cleans("\u{feff}x\u{fffc}y\u{206a}z", "xyz");
    }
}
