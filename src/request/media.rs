//! Where a medium comes from: a URL that the service fetches, or bytes that came with the request.

use std::fmt;

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::fields::{Medium, URL_BYTES};
use crate::{Error, ErrorKind, Result};

/// An image or a voice, as the request gives it.
#[derive(Clone, PartialEq, Eq)]
pub enum MediaSource {
    /// An address to fetch. It is not judged here: the service that fetches it does that.
    Url(String),
    /// The file itself.
    Bytes(Vec<u8>),
}

/// URLs lose their query and media their bytes, because a `Debug` value ends in a log sooner or later.
impl fmt::Debug for MediaSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => write!(f, "Url({})", redact_url(url)),
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
        }
    }
}

/// How many bytes a medium may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of an image file; 10 MB by default.
    pub image_bytes: u64,
    /// Bytes of an audio file; 50 MB by default.
    pub audio_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { image_bytes: 10_000_000, audio_bytes: 50_000_000 }
    }
}

impl Limits {
    /// Bytes that a file of `medium` may have.
    pub fn bytes(&self, medium: Medium) -> u64 {
        match medium {
            Medium::Image => self.image_bytes,
            Medium::Audio => self.audio_bytes,
        }
    }

    /// Refuses a file of `medium` that has `len` bytes when that is more than allowed; `name` is the field.
    ///
    /// # Errors
    /// [`ErrorKind::ImageTooLarge`] or [`ErrorKind::AudioTooLarge`].
    pub fn check(&self, medium: Medium, name: &str, len: u64) -> Result<()> {
        let most = self.bytes(medium);
        if len <= most {
            return Ok(());
        }
        let kind = match medium {
            Medium::Image => ErrorKind::ImageTooLarge,
            Medium::Audio => ErrorKind::AudioTooLarge,
        };
        Err(Error::new(kind, format!("`{name}` has {len} bytes or more, expected at most {most}")))
    }
}

/// `url` without user, password, query and fragment: fit for logs and messages.
pub fn redact_url(url: &str) -> String {
    let end = url.find(['?', '#']).unwrap_or(url.len());
    let (kept, cut) = url.split_at(end);
    let mut shown = match kept.split_once("//") {
        Some((scheme, rest)) => {
            let host_end = rest.find('/').unwrap_or(rest.len());
            let host_start = rest[..host_end].rfind('@').map_or(0, |at| at + 1);
            format!("{scheme}//{}", &rest[host_start..])
        }
        None => kept.to_string(),
    };
    if !cut.is_empty() {
        shown.push_str("?…");
    }
    shown
}

/// Reads a URL, a `data:` URI or base64 text given for the field `name`.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] when `text` is neither; [`ErrorKind::InvalidImage`] and
/// [`ErrorKind::InvalidAudio`] when a `data:` URI says that it holds something else;
/// [`ErrorKind::InvalidImage`] and [`ErrorKind::EmptyAudio`] when there are no bytes;
/// the kinds of [`Limits::check`].
pub(super) fn parse(name: &str, medium: Medium, text: &str, limits: &Limits) -> Result<MediaSource> {
    let text = text.trim();
    if text.is_empty() {
        return Err(empty(name, medium));
    }
    match scheme(text) {
        Some(scheme) if scheme.eq_ignore_ascii_case("data") => {
            data_uri(name, medium, &text["data:".len()..], limits).map(MediaSource::Bytes)
        }
        Some(_) if text.len() > URL_BYTES => {
            let what = format!("is a URL of {} bytes, expected at most {URL_BYTES}", text.len());
            Err(invalid(name, &what, "URL_TOO_LONG"))
        }
        Some(_) => Ok(MediaSource::Url(text.to_string())),
        None => base64_bytes(name, medium, text, limits).map(MediaSource::Bytes),
    }
}

/// What stands before the first colon, when it can be the scheme of a URL. Base64 has no colon, so that
/// anything with a scheme is meant as an address.
fn scheme(text: &str) -> Option<&str> {
    let (scheme, _) = text.get(..text.len().min(URL_BYTES)).unwrap_or(text).split_once(':')?;
    let word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.');
    (scheme.starts_with(|c: char| c.is_ascii_alphabetic()) && scheme.bytes().all(word)).then_some(scheme)
}

/// The bytes of `data:[<type>][;<parameter>]*;base64,<data>`, without its `data:`.
fn data_uri(name: &str, medium: Medium, rest: &str, limits: &Limits) -> Result<Vec<u8>> {
    let Some((head, data)) = rest.split_once(',') else {
        return Err(invalid(
            name,
            "is a data URI without a comma, expected data:<type>;base64,<data>",
            BASE64,
        ));
    };
    let mut parts = head.split(';').map(str::trim);
    let mime = parts.next().unwrap_or_default().to_ascii_lowercase();
    if !parts.any(|p| p.eq_ignore_ascii_case("base64")) {
        return Err(invalid(
            name,
            "is a data URI without `;base64`, expected data:<type>;base64,<data>",
            BASE64,
        ));
    }
    let (kind, families): (_, &[&str]) = match medium {
        Medium::Image => (ErrorKind::InvalidImage, &["image/"]),
        // Recorders in browsers label speech without pictures as video too.
        Medium::Audio => (ErrorKind::InvalidAudio, &["audio/", "video/", "application/ogg"]),
    };
    let untyped = mime.is_empty() || mime == "application/octet-stream";
    if !untyped && !families.iter().any(|f| mime.starts_with(f)) {
        let shown: String = mime.chars().take(60).collect();
        let message = format!("`{name}` is a data URI of type `{shown}`, expected `{}…`", families[0]);
        return Err(Error::new(kind, message).with_reason("DATA_URI_TYPE"));
    }
    base64_bytes(name, medium, data, limits)
}

const BASE64: &str = "INVALID_BASE64";

/// Takes base64 as people send it: either alphabet, padded or not, broken into lines.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

fn base64_bytes(name: &str, medium: Medium, text: &str, limits: &Limits) -> Result<Vec<u8>> {
    // A quarter of slack for line breaks; what is longer cannot decode to an allowed size.
    let least = (text.len() / 5 * 3) as u64;
    limits.check(medium, name, least)?;
    let standard: Vec<u8> = text
        .bytes()
        .filter(|b| !b.is_ascii_whitespace())
        .map(|b| match b {
            b'-' => b'+',
            b'_' => b'/',
            b => b,
        })
        .collect();
    let bytes = LENIENT.decode(&standard).map_err(|e| {
        invalid(name, "is neither a URL nor a data URI nor base64", BASE64)
            .with_hint("a URL starts with http:// or https://")
            .with_source(e)
    })?;
    limits.check(medium, name, bytes.len() as u64)?;
    if bytes.is_empty() {
        return Err(empty(name, medium));
    }
    Ok(bytes)
}

/// A file of no bytes is judged like any other file that is no image or no voice.
fn empty(name: &str, medium: Medium) -> Error {
    let (kind, reason) = match medium {
        Medium::Image => (ErrorKind::InvalidImage, "IMAGE_EMPTY"),
        Medium::Audio => (ErrorKind::EmptyAudio, "AUDIO_EMPTY"),
    };
    Error::new(kind, format!("`{name}` is empty (0 bytes)")).with_reason(reason)
}

fn invalid(name: &str, what: &str, reason: &'static str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("`{name}` {what}")).with_reason(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Limits = Limits { image_bytes: 8, audio_bytes: 8 };

    fn image(text: &str) -> Result<MediaSource> {
        parse("image", Medium::Image, text, &SMALL)
    }

    #[test]
    fn base64_is_taken_as_people_send_it() {
        let want = MediaSource::Bytes(vec![0xfb, 0xff, 0xbf, 0x01]);
        for text in [
            "+/+/AQ==",
            "+/+/AQ",
            "-_-_AQ",
            " +/+/\r\nAQ==\n",
            "data:;base64,+/+/AQ==",
            "data:image/png;base64,+/+/AQ==",
            "DATA:IMAGE/PNG;BASE64,+/+/AQ==",
            "data:image/png;name=a.png;base64, +/+/AQ==",
            "data:application/octet-stream;base64,+/+/AQ==",
        ] {
            assert_eq!(image(text).unwrap(), want, "{text}");
        }
    }

    #[test]
    fn whatever_has_a_scheme_is_an_address() {
        for url in
            ["https://a.example/x?sig=1", "file:///etc/passwd", "gopher://x", "http:127.0.0.1", "C:\\a.png"]
        {
            assert_eq!(image(url).unwrap(), MediaSource::Url(url.to_string()));
        }
    }

    #[test]
    fn what_is_none_of_the_three_is_refused() {
        use ErrorKind::*;
        for (text, kind, reason) in [
            ("", InvalidImage, "IMAGE_EMPTY"),
            ("  ", InvalidImage, "IMAGE_EMPTY"),
            ("data:image/png;base64,", InvalidImage, "IMAGE_EMPTY"),
            ("//example.com/a.png", InvalidInput, BASE64),
            ("portrait.png", InvalidInput, BASE64),
            ("AAAAA", InvalidInput, BASE64),
            ("data:image/png;base64", InvalidInput, BASE64),
            ("data:image/png,AAAA", InvalidInput, BASE64),
            ("data:text/html;base64,AAAA", InvalidImage, "DATA_URI_TYPE"),
        ] {
            let e = parse("image", Medium::Image, text, &Limits::default()).unwrap_err();
            assert_eq!((e.kind(), e.reason()), (kind, Some(reason)), "{text}: {e}");
        }
        for text in ["", "data:audio/wav;base64,"] {
            let e = parse("audio", Medium::Audio, text, &Limits::default()).unwrap_err();
            assert_eq!((e.kind(), e.reason()), (EmptyAudio, Some("AUDIO_EMPTY")), "{text}: {e}");
        }
        let long = format!("https://a.example/{}", "x".repeat(URL_BYTES));
        assert_eq!(image(&long).unwrap_err().reason(), Some("URL_TOO_LONG"));
    }

    #[test]
    fn sizes_are_limited_before_and_after_decoding() {
        assert!(image("AAAAAAAAAAA=").is_ok(), "8 bytes are allowed");
        for text in ["AAAAAAAAAAAA", &"A".repeat(1 << 20)] {
            assert_eq!(image(text).unwrap_err().kind(), ErrorKind::ImageTooLarge);
            let e = parse("audio", Medium::Audio, text, &SMALL).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::AudioTooLarge);
        }
    }

    #[test]
    fn shown_urls_keep_no_secret() {
        for (url, shown) in [
            ("https://a.example/x.png", "https://a.example/x.png"),
            ("https://a.example/x.png?sig=s3cret", "https://a.example/x.png?…"),
            ("https://a.example#s3cret", "https://a.example?…"),
            ("https://me:s3cret@a.example/p@th", "https://a.example/p@th"),
            ("mailto:x?s3cret", "mailto:x?…"),
        ] {
            assert_eq!(redact_url(url), shown);
        }
        assert_eq!(format!("{:?}", MediaSource::Bytes(vec![7; 3])), "Bytes(3 bytes)");
    }
}
