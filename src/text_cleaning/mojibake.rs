//! Repair of UTF-8 that was read as Latin-1 or Windows-1252 ("cafÃ©").
//!
//! After ftfy 6.3 (Robyn Speer, Apache-2.0), <https://github.com/rspeer/python-ftfy>: text that holds improbable
//! neighbours is encoded again and, when the bytes are UTF-8, decoded as what it was. Its tables are reduced to the
//! characters of the two encodings.

/// What bytes 0x80 to 0x9F are in Windows-1252; the five that it leaves out are what they are in Latin-1 ("sloppy"
/// decoding, as browsers do it).
const WINDOWS_1252: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', //
    '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

/// Stands for a byte that somebody else replaced with U+FFFD: ASCII's SUBSTITUTE.
const LOST: u8 = 0x1a;

/// Undoes wrong decodings of `text` until it looks right or nothing helps.
pub(super) fn fix(mut text: String) -> String {
    while !text.is_ascii() && is_bad(&text) {
        match fix_once(&text) {
            Some(fixed) if fixed != text => text = fixed,
            _ => break,
        }
    }
    text
}

/// Replaces C1 controls by what Windows-1252 has in their place.
pub(super) fn fix_c1_controls(text: &str) -> String {
    let fixed = |c| match c {
        '\u{80}'..='\u{9f}' => WINDOWS_1252[c as usize - 0x80],
        _ => c,
    };
    text.chars().map(fixed).collect()
}

fn fix_once(text: &str) -> Option<String> {
    let latin_1 = text.chars().map(latin_1_byte).collect::<Option<Vec<_>>>();
    if let Some(fixed) = latin_1.as_ref().and_then(|bytes| decode_utf8(restore_spaces(bytes))) {
        return Some(fixed);
    }
    if let Some(bytes) = text.chars().map(windows_1252_byte).collect::<Option<Vec<_>>>()
        && let Some(fixed) = decode_utf8(replace_lossy_sequences(&restore_spaces(&bytes)))
    {
        return Some(fixed);
    }
    let fixed = fix_parts(text);
    if fixed != text {
        return Some(fixed);
    }
    // What remains of C1 controls was meant to be Windows-1252.
    let fixed = fix_c1_controls(text);
    (fixed != text).then_some(fixed)
}

fn latin_1_byte(c: char) -> Option<u8> {
    u8::try_from(u32::from(c)).ok()
}

fn windows_1252_byte(c: char) -> Option<u8> {
    match c {
        '\u{fffd}' => Some(LOST),
        '\u{1a}' => None, // It would be taken for a lost byte.
        _ => match WINDOWS_1252.iter().position(|&w| w == c) {
            Some(i) => Some(0x80 + i as u8),
            None => latin_1_byte(c).filter(|byte| !(0x80..=0x9f).contains(byte)),
        },
    }
}

fn decode_utf8(bytes: Vec<u8>) -> Option<String> {
    String::from_utf8(bytes).ok()
}

/// A set of bytes.
type ByteSet = fn(u8) -> bool;

/// Any continuation byte but 0x85, which became an ellipsis, and 0xA0, which became a space.
const CONTINUATION: ByteSet = |b| matches!(b, 0x80..=0x84 | 0x86..=0x9f | 0xa1..=0xbf);
const ANY_CONTINUATION: ByteSet = |b| matches!(b, 0x80..=0xbf);
const SPACE: ByteSet = |b| b == b' ';
const LEAD_4: ByteSet = |b| b == 0xf0;

/// UTF-8 sequences in which a byte 0xA0 became a space, as far as they are likely ones.
const WITH_SPACE: [&[ByteSet]; 6] = [
    &[|b| matches!(b, 0xc2 | 0xc3 | 0xc5 | 0xce | 0xd0 | 0xd9), SPACE],
    &[|b| matches!(b, 0xe2 | 0xe3), SPACE, |b| CONTINUATION(b)],
    &[|b| matches!(b, 0xe0..=0xe3), CONTINUATION, SPACE],
    &[LEAD_4, SPACE, ANY_CONTINUATION, ANY_CONTINUATION],
    &[LEAD_4, ANY_CONTINUATION, SPACE, ANY_CONTINUATION],
    &[LEAD_4, ANY_CONTINUATION, ANY_CONTINUATION, SPACE],
];

const LOST_OR_QUESTION: ByteSet = |b| matches!(b, LOST | b'?');
const LOST_OR_CONTINUATION: ByteSet = |b| matches!(b, LOST | 0x80..=0xbf);
const LOSSY_LEAD_3: ByteSet = |b| matches!(b, 0xe0..=0xef);
const LOSSY_LEAD_4: ByteSet = |b| matches!(b, 0xf0..=0xf4);

/// UTF-8 sequences of which bytes were lost.
const WITH_LOST_BYTES: [&[ByteSet]; 8] = [
    &[|b| matches!(b, 0xc2..=0xdf), |b| b == LOST],
    &[|b| matches!(b, 0xc2 | 0xc3), |b| b == b'?'],
    &[LOSSY_LEAD_3, LOST_OR_QUESTION, LOST_OR_CONTINUATION],
    &[LOSSY_LEAD_3, LOST_OR_CONTINUATION, LOST_OR_QUESTION],
    &[LOSSY_LEAD_4, LOST_OR_QUESTION, LOST_OR_CONTINUATION, LOST_OR_CONTINUATION],
    &[LOSSY_LEAD_4, LOST_OR_CONTINUATION, LOST_OR_QUESTION, LOST_OR_CONTINUATION],
    &[LOSSY_LEAD_4, LOST_OR_CONTINUATION, LOST_OR_CONTINUATION, LOST_OR_QUESTION],
    &[|b| b == LOST],
];

/// The length of the first of `patterns` that `bytes` starts with.
fn match_start(bytes: &[u8], patterns: &[&[ByteSet]]) -> Option<usize> {
    let matches = |pattern: &&&[ByteSet]| {
        bytes.len() >= pattern.len() && pattern.iter().zip(bytes).all(|(set, &byte)| set(byte))
    };
    patterns.iter().find(matches).map(|pattern| pattern.len())
}

/// `bytes` with each match of `patterns`, from the left, rewritten by `rewrite`.
fn rewrite_matches(bytes: &[u8], patterns: &[&[ByteSet]], rewrite: impl Fn(&[u8], &mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&first, others)) = rest.split_first() {
        match match_start(rest, patterns) {
            Some(len) => {
                rewrite(&rest[..len], &mut out);
                rest = &rest[len..];
            }
            None => {
                out.push(first);
                rest = others;
            }
        }
    }
    out
}

/// Makes a space 0xA0 again where that completes a UTF-8 sequence.
fn restore_spaces(bytes: &[u8]) -> Vec<u8> {
    let altered = (0..bytes.len()).any(|i| match_start(&bytes[i..], &WITH_SPACE).is_some());
    if !altered {
        return bytes.to_vec();
    }
    // "Ã " is mostly the word "à" and not the start of the next one, but for these in Portuguese.
    const A_GRAVE_JOINS: [&[u8]; 5] = [b" ", b"quele", b"quela", b"quilo", b"s "];
    let mut words = Vec::with_capacity(bytes.len());
    for (i, &byte) in bytes.iter().enumerate() {
        let after_space = bytes.get(i + 1..).and_then(|rest| rest.strip_prefix(b" "));
        words.push(byte);
        if byte == 0xc3
            && after_space.is_some_and(|rest| !A_GRAVE_JOINS.iter().any(|join| rest.starts_with(join)))
        {
            words.push(0xa0);
        }
    }
    rewrite_matches(&words, &WITH_SPACE, |sequence, out| {
        out.extend(sequence.iter().map(|&byte| if byte == b' ' { 0xa0 } else { byte }));
    })
}

/// Makes sequences that lost a byte U+FFFD as a whole.
fn replace_lossy_sequences(bytes: &[u8]) -> Vec<u8> {
    rewrite_matches(bytes, &WITH_LOST_BYTES, |_, out| out.extend('\u{fffd}'.to_string().bytes()))
}

/// Repairs stretches that look like UTF-8 by themselves, in text that as a whole does not.
fn fix_parts(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < chars.len() {
        let garbled_before = i > 0 && is_strict_continuation(chars[i - 1]);
        let len = if garbled_before { 0 } else { utf8_like_len(&chars[i..]) };
        if len == 0 {
            out.push(chars[i]);
            i += 1;
            continue;
        }
        let part: String = chars[i..i + len].iter().collect();
        // A part that is the whole would be repaired for ever.
        let repairable = len < chars.len() && is_bad(&part);
        out.push_str(&if repairable { fix(part) } else { part });
        i += len;
    }
    out
}

/// How many of `chars`, from the first, look like UTF-8 sequences seen through a one-byte encoding. Š, Ž and š lead
/// sequences, and Æ, Ø, æ and ø continue them, in Windows-1257: ftfy's rules are kept so that a stretch ends where it
/// ends there, though that encoding is not tried.
fn utf8_like_len(chars: &[char]) -> usize {
    let mut len = 0;
    while let Some(&lead) = chars.get(len) {
        let continuations = match lead {
            '\u{c2}'..='\u{df}' | 'Š' | 'Ž' => 1,
            '\u{e0}'..='\u{ef}' => 2,
            'ð' | 'ó' | 'š' => 3,
            _ => break,
        };
        let end = len + 1 + continuations;
        if !chars.get(len + 1..end).is_some_and(|cs| cs.iter().all(|&c| is_continuation(c))) {
            break;
        }
        len = end;
    }
    len
}

/// Bytes 0x80 to 0xBF in either encoding, and a space, which may have been 0xA0.
fn is_continuation(c: char) -> bool {
    matches!(c, '\u{80}'..='\u{bf}' | ' ' | 'Æ' | 'Ø' | 'æ' | 'ø') || WINDOWS_1252.contains(&c)
}

/// A continuation that does not usually stand for itself beside mojibake.
fn is_strict_continuation(c: char) -> bool {
    is_continuation(c) && !" –—‘’‚“”„•…".contains(c)
}

/// Sets of characters by the company they keep.
mod class {
    pub const C1: u32 = 1;
    pub const BAD: u32 = 1 << 1;
    pub const LAW: u32 = 1 << 2;
    pub const CURRENCY: u32 = 1 << 3;
    pub const START: u32 = 1 << 4;
    pub const END: u32 = 1 << 5;
    pub const NUMERIC: u32 = 1 << 6;
    pub const UPPER: u32 = 1 << 7;
    pub const LOWER: u32 = 1 << 8;
    pub const COMMON: u32 = 1 << 9;
    pub const ASCII_LOWER: u32 = 1 << 10;
    pub const ASCII_LETTER: u32 = 1 << 11;
    pub const NO_ASCII_LETTER: u32 = 1 << 12;
    pub const WORD: u32 = 1 << 13;
    pub const WHITESPACE: u32 = 1 << 14;
}

fn classes(c: char) -> u32 {
    use class::*;
    let special = match c {
        '\u{80}'..='\u{9f}' => C1,
        '¦' | '¤' | '¨' | '¬' | '¯' | '¸' | 'ƒ' | 'ˆ' | '˜' | '†' | '‡' | '‰' | '\u{fffd}' | 'ª' | 'º' => {
            BAD
        }
        '¶' | '§' => LAW,
        '¢' | '£' | '¥' | '€' => CURRENCY,
        '¡' | '«' | '¿' | '©' | '‘' | '‚' | '“' | '„' | '•' | '‹' => START,
        '®' | '»' | '”' | '›' | '™' => END,
        '²' | '³' | '¹' | '±' | '¼' | '½' | '¾' | '×' | 'µ' | '÷' => NUMERIC,
        'À'..='Ñ' | 'Ø' | 'Ü' | 'Ý' | 'Œ' | 'Š' | 'Ÿ' | 'Ž' => UPPER,
        'ß' | 'à'..='ñ' | 'œ' | 'š' | 'ü' | 'ž' => LOWER,
        '\u{a0}' | '\u{ad}' | '·' | '´' | '–' | '—' | '…' | '’' => COMMON,
        'a'..='z' => ASCII_LOWER,
        _ => 0,
    };
    let letter = if c.is_ascii_alphabetic() { ASCII_LETTER } else { NO_ASCII_LETTER };
    let word = if c.is_alphanumeric() || c == '_' { WORD } else { 0 };
    special | letter | word | if c.is_whitespace() { WHITESPACE } else { 0 }
}

/// One character of a rule: of one of these classes, or one of these characters.
type Member = (u32, &'static str);

/// Neighbours that hardly occur in text that was meant so.
const IMPROBABLE: &[&[Member]] = {
    use class::*;
    const ARABIC: Member = (COMMON | CURRENCY | BAD | NUMERIC | START, "ŸŠ®°µ»");
    &[
        &[(C1, "")],
        &[(BAD | LOWER | UPPER | START | END | CURRENCY | NUMERIC | LAW, ""), (BAD, "")],
        &[(ASCII_LETTER, ""), (0, "Þ"), (BAD, "")],
        &[(BAD, ""), (LOWER | UPPER | START | END | CURRENCY | NUMERIC | LAW, "")],
        &[(LOWER | END | CURRENCY | NUMERIC, ""), (UPPER, "")],
        &[(END | CURRENCY | NUMERIC, ""), (LOWER, "")],
        &[(LOWER | END, ""), (CURRENCY, "")],
        &[(WHITESPACE, ""), (UPPER, ""), (CURRENCY, "")],
        &[(UPPER, ""), (NUMERIC | LAW, "")],
        &[(LOWER | UPPER | CURRENCY | END, ""), (START, ""), (NUMERIC, "")],
        &[(LOWER | UPPER | CURRENCY | NUMERIC | LAW, ""), (END, ""), (START, "")],
        &[(CURRENCY | NUMERIC, ""), (START, "")],
        &[(ASCII_LOWER, ""), (UPPER, ""), (START | CURRENCY, "")],
        &[(LOWER | UPPER, ""), (START | END, ""), (WORD, "")],
        &[(0, "Œœ"), (NO_ASCII_LETTER, "")],
        &[(UPPER, ""), (0, "°")],
        &[(0, "ÂÃÎÐ"), (START | END, "€œŠš¢£Ÿž\u{a0}\u{ad}®©°·»–—´")],
        &[(0, "×"), (0, "²³")],
        &[(0, "ØÙ"), ARABIC, (0, "ØÙ"), ARABIC],
        &[(0, "à"), (0, "²µ¹¼½¾")],
        &[(0, "Ã"), (0, "\u{a0}¡")],
        &[(ASCII_LOWER, ""), (0, "ÃÂ"), (0, " ")],
        &[(ASCII_LOWER, ""), (WHITESPACE, ""), (0, "ÃÂ"), (0, " ")],
        &[(ASCII_LOWER | END, ".,?!"), (0, "Â"), (START | END, " ")],
    ]
};

/// Whether `text` holds neighbours that hardly occur in text that was meant so.
fn is_bad(text: &str) -> bool {
    if text.starts_with("Ã ") || text.starts_with("Â ") {
        return true;
    }
    let chars: Vec<(char, u32)> = text.chars().map(|c| (c, classes(c))).collect();
    let starts_rule = |i: usize| {
        IMPROBABLE.iter().any(|rule| {
            let matches =
                |(&(set, also), &(c, class)): (&Member, &(char, u32))| class & set != 0 || also.contains(c);
            chars.len() - i >= rule.len() && rule.iter().zip(&chars[i..]).all(matches)
        })
    };
    (0..chars.len()).any(starts_rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn fixes(text: &str, expected: &str) {
        assert_eq!(fix(text.to_owned()), expected, "{text:?}");
    }

    // What is expected here was computed by `ftfy.fix_encoding` of ftfy 6.3.1.

    #[test]
    fn utf8_read_as_one_byte_characters_is_repaired() {
        fixes("cafÃ© crÃ¨me", "café crème");
        fixes("â€œquoteâ€\u{9d} â€” dash", "“quote” — dash");
        fixes("l’humanitÃ©", "l’humanité");
        fixes("ÃƒÂ©", "é"); // twice
        fixes("ð\u{9f}\u{98}\u{80}", "😀");
        fixes("ðŸ˜€ smile", "😀 smile");
        fixes("voilÃ le travail", "voilà le travail");
        fixes("Ã la mode", "à la mode");
        fixes("â€œ like this â€\u{fffd}", "“ like this \u{fffd}");
    }

    #[test]
    fn a_part_is_repaired_beside_characters_of_no_one_byte_encoding() {
        fixes("色 cafÃ©Ã© 调", "色 caféé 调");
    }

    #[test]
    fn c1_controls_are_windows_1252() {
        fixes("it\u{92}s", "it’s");
        assert_eq!(fix_c1_controls("\u{85}\u{81}a"), "…\u{81}a");
    }

    #[test]
    fn text_that_was_meant_so_stays() {
        for text in [
            "naïve café",
            "CAFÉ™",
            "Ångström Å å",
            "¿Qué? ¡Sí!",
            "25 °C ± 2",
            "“É” — ó",
            "10 £ é",
            "色调",
            "MÃE",
        ] {
            fixes(text, text);
        }
    }
}
