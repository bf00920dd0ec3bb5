//! Keys: what they look like, and the only thing that is kept of them.

use sha2::{Digest, Sha256};

use super::config::Secret;

/// How keys begin, so that scanners for leaked secrets find them.
const PREFIX: &str = "talkie_";
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// Letters of 32 bytes: 256 bits at 5.95 a letter.
const LETTERS: usize = 43;
/// Letters of 32 bits.
const CHECK_LETTERS: usize = 6;

/// A new key: `talkie_`, 32 random bytes in base62, and six letters that tell a mistyped key from a revoked one.
pub fn generate() -> Secret {
    let body = format!("{PREFIX}{}", base62(&rand::random::<[u8; 32]>(), LETTERS));
    let check = base62(&hash(&body)[..4], CHECK_LETTERS);
    Secret::new(body + &check)
}

/// What is kept of a key. A fast hash is right: keys are random, and so cannot be guessed through it.
pub fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// `bytes` as one large number, in `letters` letters.
fn base62(bytes: &[u8], letters: usize) -> String {
    let mut number = bytes.to_vec();
    let mut text: Vec<u8> = (0..letters)
        .map(|_| {
            let mut rest = 0;
            for byte in &mut number {
                let value = rest * 256 + usize::from(*byte);
                *byte = (value / 62) as u8;
                rest = value % 62;
            }
            ALPHABET[rest]
        })
        .collect();
    text.reverse();
    text.into_iter().map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_base_62() {
        assert_eq!(base62(&[0, 0], 3), "000");
        assert_eq!(base62(&[61], 1), "z");
        assert_eq!(base62(&[0, 62], 2), "10");
        assert_eq!(base62(&[1, 0], 3), "048");
        // 2^256 - 1 fits and leaves nothing over.
        assert_eq!(base62(&[255; 32], LETTERS + 1).chars().next(), Some('0'));
        assert_ne!(base62(&[255; 32], LETTERS).chars().next(), Some('0'));
    }

    #[test]
    fn keys_are_all_different_and_of_one_form() {
        let (a, b) = (generate(), generate());
        assert_ne!(a.expose(), b.expose());
        for key in [&a, &b] {
            let (body, check) = key.expose().split_at(PREFIX.len() + LETTERS);
            assert!(body.starts_with(PREFIX), "{body}");
            assert_eq!(check, base62(&hash(body)[..4], CHECK_LETTERS));
            assert_eq!(format!("{key:?}"), "[REDACTED]");
        }
    }
}
