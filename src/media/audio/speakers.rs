//! Two voices on one time line.

use serde::{Deserialize, Serialize};

/// How two voices share the video.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Speakers {
    /// Both start with the video; the reference's `para`.
    #[default]
    #[serde(alias = "para")]
    Together,
    /// The first speaks, then the second; the reference's `add`.
    #[serde(alias = "add")]
    InTurn,
}

impl Speakers {
    /// Lays two signals of one rate on one time line, silent where the other speaks; both results are
    /// equally long. A missing voice is silence as long as the other one, so `InTurn` with one voice lasts
    /// twice as long. [`Speakers::Together`] pads the shorter voice, which the reference refuses.
    pub fn assemble(self, first: Option<&[f32]>, second: Option<&[f32]>) -> [Vec<f32>; 2] {
        let len = |voice: Option<&[f32]>| voice.map(<[f32]>::len);
        let first_len = len(first).or(len(second)).unwrap_or(0);
        let second_len = len(second).or(len(first)).unwrap_or(0);
        let (second_at, total) = match self {
            Self::Together => (0, first_len.max(second_len)),
            Self::InTurn => (first_len, first_len + second_len),
        };
        [place(first, 0, total), place(second, second_at, total)]
    }
}

/// `voice` from sample `at` on in `total` samples of silence.
fn place(voice: Option<&[f32]>, at: usize, total: usize) -> Vec<f32> {
    let mut track = vec![0.0; total];
    if let Some(voice) = voice {
        track[at..at + voice.len()].copy_from_slice(voice);
    }
    track
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn together_pads_the_shorter_voice() {
        let [a, b] = Speakers::Together.assemble(Some(&[1.0, 2.0]), Some(&[3.0]));
        assert_eq!((a, b), (vec![1.0, 2.0], vec![3.0, 0.0]));
    }

    #[test]
    fn in_turn_puts_the_second_after_the_first() {
        let [a, b] = Speakers::InTurn.assemble(Some(&[1.0, 2.0]), Some(&[3.0]));
        assert_eq!((a, b), (vec![1.0, 2.0, 0.0], vec![0.0, 0.0, 3.0]));
    }

    #[test]
    fn a_missing_voice_is_as_long_as_the_other() {
        let [a, b] = Speakers::InTurn.assemble(None, Some(&[3.0, 4.0]));
        assert_eq!((a, b), (vec![0.0; 4], vec![0.0, 0.0, 3.0, 4.0]));
        let [a, b] = Speakers::Together.assemble(Some(&[3.0]), None);
        assert_eq!((a, b), (vec![3.0], vec![0.0]));
        assert_eq!(Speakers::InTurn.assemble(None, None), [Vec::new(), Vec::new()] as [Vec<f32>; 2]);
    }

    #[test]
    fn reads_the_names_of_the_reference_too() {
        for (name, mode) in
            [("together", Speakers::Together), ("add", Speakers::InTurn), ("para", Speakers::Together)]
        {
            assert_eq!(serde_json::from_str::<Speakers>(&format!("\"{name}\"")).unwrap(), mode);
        }
    }
}
