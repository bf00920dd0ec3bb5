//! Media in and out: audio and images are decoded here, H.264 + AAC in MP4 is written here.

pub mod audio;
pub mod image;
pub mod video;
