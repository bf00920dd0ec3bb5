//! Which frames each window covers and which of them go out: pure arithmetic.
//!
//! Source: MeiGen-AI/InfiniteTalk at 0107cd9, `wan/multitalk.py`, the loop of `generate_infinitetalk`. A window
//! is F frames long; every window after the first starts on the last M frames of the one before, so it adds
//! F − M. Different from the reference: what fits into one window takes one window (the reference refuses audio
//! of F frames or less).

use crate::{Error, ErrorKind, Result};

/// The windows of one video.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    frames_per_window: usize,
    motion_frames: usize,
    windows: usize,
    total_frames: usize,
}

/// One window of a [`Plan`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Position in the plan, from 0.
    pub index: usize,
    /// First frame that it covers, counted from the start of the video and of the audio.
    pub start: usize,
    /// Frames at its start that the window before has put out already.
    pub skip: usize,
    /// Frames after these that go into the video.
    pub take: usize,
    /// Whether no window follows.
    pub is_last: bool,
}

impl Plan {
    /// Plans windows of `frames_per_window` (4n+1) frames that overlap by `motion_frames` (4n+1, fewer), for
    /// persons whose audio embeddings have `embed_lens` frames (one or two, the first decides how many windows
    /// there are), cut at `max_frames`.
    pub fn new(
        frames_per_window: usize,
        motion_frames: usize,
        embed_lens: &[usize],
        max_frames: usize,
    ) -> Result<Self> {
        for (name, value) in [("frames_per_window", frames_per_window), ("motion_frames", motion_frames)] {
            if value % 4 != 1 {
                let message =
                    format!("`{name}` is {value}, expected 4n+1 (for example {})", value / 4 * 4 + 1);
                return Err(Error::new(ErrorKind::InvalidInput, message));
            }
        }
        if motion_frames >= frames_per_window {
            let message = format!(
                "`motion_frames` is {motion_frames}, expected fewer than `frames_per_window` ({frames_per_window})"
            );
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let (Some(&first), Some(&last)) = (embed_lens.first(), embed_lens.last()) else {
            return Err(Error::new(ErrorKind::MissingField, "there is no audio to plan windows for"));
        };
        let wanted = max_frames.min(first);
        if wanted == 0 {
            return Err(Error::new(
                ErrorKind::EmptyAudio,
                "the audio is shorter than one video frame (40 ms)",
            ));
        }
        let stride = frames_per_window - motion_frames;
        let further = wanted.saturating_sub(frames_per_window).div_ceil(stride);
        let end = frames_per_window + further * stride;
        let total_frames = if further == 0 {
            wanted
        } else if embed_lens.iter().any(|&len| end >= len) {
            max_frames.min(end).min(last)
        } else {
            max_frames.min(end)
        };
        Ok(Self { frames_per_window, motion_frames, windows: further + 1, total_frames })
    }

    /// Frames of the video.
    pub fn total_frames(&self) -> usize {
        self.total_frames
    }

    /// How many windows there are, at least one.
    pub fn num_windows(&self) -> usize {
        self.windows
    }

    /// The windows in order.
    pub fn windows(&self) -> impl Iterator<Item = Window> + use<> {
        let Self { frames_per_window, motion_frames, windows, total_frames } = *self;
        (0..windows).map(move |index| {
            let start = index * (frames_per_window - motion_frames);
            let skip = if index == 0 { 0 } else { motion_frames };
            let take = total_frames.saturating_sub(start).min(frames_per_window).saturating_sub(skip);
            Window { index, start, skip, take, is_last: index + 1 == windows }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_every_frame_once() -> Result<()> {
        for (frames, motion) in [(17, 9), (13, 5), (81, 9), (5, 1)] {
            for len in 1..300 {
                let plan = Plan::new(frames, motion, &[len], usize::MAX)?;
                assert_eq!(plan.total_frames(), len);
                let windows: Vec<_> = plan.windows().collect();
                assert_eq!(windows.len(), plan.num_windows());
                let mut next = 0;
                for window in &windows {
                    assert_eq!(window.start + window.skip, next, "{window:?}");
                    assert!(window.take > 0, "{window:?} puts nothing out");
                    next += window.take;
                }
                assert_eq!(next, len);
                assert!(windows.iter().rev().skip(1).all(|w| !w.is_last));
            }
        }
        Ok(())
    }

    #[test]
    fn audio_of_one_window_or_less_takes_one_window() -> Result<()> {
        assert_eq!(Plan::new(81, 9, &[81], usize::MAX)?.num_windows(), 1);
        assert_eq!(Plan::new(81, 9, &[82], usize::MAX)?.num_windows(), 2);
        assert_eq!(Plan::new(81, 9, &[500], 81)?.num_windows(), 1, "the reference's clip mode");
        Ok(())
    }

    #[test]
    fn the_last_person_decides_where_an_extended_video_ends() -> Result<()> {
        assert_eq!(Plan::new(17, 9, &[30, 26], 1000)?.total_frames(), 26);
        assert_eq!(Plan::new(17, 9, &[60, 60], 22)?.total_frames(), 22);
        Ok(())
    }

    #[test]
    fn impossible_windows_are_named() {
        let message = |f, m, lens: &[usize]| Plan::new(f, m, lens, 100).expect_err("refused").to_string();
        assert!(message(80, 9, &[100]).contains("`frames_per_window` is 80, expected 4n+1"));
        assert!(message(81, 8, &[100]).contains("`motion_frames` is 8"));
        assert!(message(9, 9, &[100]).contains("fewer than"));
        assert!(message(17, 9, &[0]).contains("shorter than one video frame"));
        assert!(message(17, 9, &[]).contains("no audio"));
    }
}
