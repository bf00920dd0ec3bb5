use std::io::Cursor;

use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, GrayImage, ImageEncoder, Rgb, RgbImage, RgbaImage};

use super::*;

const WIDTH: u32 = 96;
const HEIGHT: u32 = 80;

/// Smooth, and different at each corner, so that turning and cutting show.
fn picture() -> RgbImage {
    RgbImage::from_fn(WIDTH, HEIGHT, |x, y| Rgb([(x * 2) as u8, (y * 3) as u8, 60]))
}

fn encoded(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn jpeg() -> Vec<u8> {
    encoded(picture(), ImageFormat::Jpeg)
}

fn open(bytes: &[u8]) -> Result<Portrait> {
    Portrait::open(bytes, &Limits::default())
}

fn refused(bytes: &[u8]) -> (ErrorKind, &'static str) {
    let error = open(bytes).expect_err("this image must be refused");
    (error.kind(), error.reason().unwrap_or_default())
}

const CORRUPT: (ErrorKind, &str) = (ErrorKind::InvalidImage, "IMAGE_CORRUPT");
const DIMENSIONS: (ErrorKind, &str) = (ErrorKind::ImageTooLarge, "IMAGE_DIMENSIONS");

/// Fails unless `bytes` decode to something close to `expected`.
fn shows(bytes: &[u8], expected: &RgbImage, tolerance: u8) {
    let portrait = open(bytes).unwrap();
    let size = Size { height: expected.height() as usize, width: expected.width() as usize };
    assert_eq!(portrait.size(), size);
    let worst = portrait.rgb().iter().zip(expected.as_raw()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert!(worst <= tolerance, "off by {worst}");
}

/// One chunk of a PNG. Its checksum is the usual CRC-32.
fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let body = [kind, data].concat();
    let crc = body.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & 0u32.wrapping_sub(crc & 1)))
    });
    [&(data.len() as u32).to_be_bytes()[..], &body, &(!crc).to_be_bytes()].concat()
}

/// A PNG of that header whose pixels are `rows`, stored without compression.
fn png(width: u32, height: u32, depth: u8, color: u8, extra: &[u8], rows: &[u8]) -> Vec<u8> {
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[depth, color, 0, 0, 0]].concat();
    let (mut a, mut b) = (1u32, 0u32);
    rows.iter().for_each(|&v| {
        a = (a + u32::from(v)) % 65_521;
        b = (b + a) % 65_521;
    });
    let mut data = vec![0x78, 0x01];
    let blocks = rows.chunks(65_535).count().max(1);
    for (i, block) in rows.chunks(65_535).enumerate() {
        let len = block.len() as u16;
        data.push(u8::from(i + 1 == blocks));
        data.extend([len.to_le_bytes(), (!len).to_le_bytes()].concat());
        data.extend(block);
    }
    data.extend((b << 16 | a).to_be_bytes());
    [b"\x89PNG\r\n\x1a\n", &chunk(b"IHDR", &header)[..], extra, &chunk(b"IDAT", &data), &chunk(b"IEND", &[])]
        .concat()
}

#[test]
fn the_three_formats_are_read() {
    shows(&encoded(picture(), ImageFormat::Png), &picture(), 0);
    shows(&encoded(picture(), ImageFormat::WebP), &picture(), 0);
    shows(&jpeg(), &picture(), 12);
}

#[test]
fn sixteen_bits_and_palettes_are_read() {
    let deep = DynamicImage::from(picture()).into_rgb16();
    shows(&encoded(deep, ImageFormat::Png), &picture(), 0);
    let gray = GrayImage::from_fn(WIDTH, HEIGHT, |x, _| image::Luma([(x * 2) as u8]));
    shows(&encoded(gray.clone(), ImageFormat::Png), &DynamicImage::from(gray).into_rgb8(), 0);

    let palette = [[255u8, 0, 0], [0, 255, 0], [0, 0, 255]];
    let rows: Vec<u8> = (0..HEIGHT)
        .flat_map(|y| std::iter::once(0).chain((0..WIDTH).map(move |x| ((x + y) % 3) as u8)))
        .collect();
    let expected = RgbImage::from_fn(WIDTH, HEIGHT, |x, y| Rgb(palette[((x + y) % 3) as usize]));
    shows(&png(WIDTH, HEIGHT, 8, 3, &chunk(b"PLTE", palette.as_flattened()), &rows), &expected, 0);
}

#[test]
fn what_is_transparent_becomes_white() {
    let image = RgbaImage::from_fn(WIDTH, HEIGHT, |x, _| match x {
        0..32 => image::Rgba([10, 20, 30, 0]),
        32..64 => image::Rgba([10, 20, 30, 128]),
        _ => image::Rgba([10, 20, 30, 255]),
    });
    let expected = RgbImage::from_fn(WIDTH, HEIGHT, |x, _| match x {
        0..32 => Rgb([255, 255, 255]),
        32..64 => Rgb([132, 137, 142]),
        _ => Rgb([10, 20, 30]),
    });
    for format in [ImageFormat::Png, ImageFormat::WebP] {
        shows(&encoded(image.clone(), format), &expected, 0);
    }
}

#[test]
fn the_camera_s_orientation_is_applied() {
    let exif = |orientation: u8| {
        [&b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0"[..], &[orientation, 0, 0, 0, 0, 0, 0, 0]].concat()
    };
    for (orientation, turned) in [
        (3, image::imageops::rotate180(&picture())),
        (6, image::imageops::rotate90(&picture())),
        (8, image::imageops::rotate270(&picture())),
    ] {
        let mut bytes = Vec::new();
        let mut encoder = JpegEncoder::new_with_quality(&mut bytes, 95);
        encoder.set_exif_metadata(exif(orientation)).unwrap();
        encoder.write_image(picture().as_raw(), WIDTH, HEIGHT, ExtendedColorType::Rgb8).unwrap();
        shows(&bytes, &turned, 12);
    }
}

#[test]
fn print_and_web_jpegs_are_read() {
    // Made by scripts/make-media-fixtures.sh: left half red, right half blue.
    let halves = RgbImage::from_fn(96, 64, |x, _| if x < 48 { Rgb([254, 0, 0]) } else { Rgb([0, 0, 254]) });
    shows(
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/media/halves-progressive.jpg")),
        &halves,
        60,
    );
    shows(include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/media/halves-cmyk.jpg")), &halves, 8);
}

#[test]
fn an_animation_gives_its_first_frame() {
    // A WebP of two frames around the lossless bitstreams that the encoder makes.
    let frame = |image: RgbImage| {
        let still = encoded(image, ImageFormat::WebP);
        let bitstream = &still[12..];
        let side = |v: u32| (v - 1).to_le_bytes()[..3].to_vec();
        let header = [vec![0; 6], side(WIDTH), side(HEIGHT), vec![100, 0, 0, 2]].concat();
        riff_chunk(b"ANMF", &[&header, bitstream].concat())
    };
    let side = |v: u32| (v - 1).to_le_bytes()[..3].to_vec();
    let body = [
        b"WEBP".to_vec(),
        riff_chunk(b"VP8X", &[vec![0x02, 0, 0, 0], side(WIDTH), side(HEIGHT)].concat()),
        riff_chunk(b"ANIM", &[0; 6]),
        frame(picture()),
        frame(RgbImage::new(WIDTH, HEIGHT)),
    ]
    .concat();
    shows(&riff_chunk(b"RIFF", &body), &picture(), 0);
}

fn riff_chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let mut chunk = [kind, &(data.len() as u32).to_le_bytes()[..], data].concat();
    chunk.resize(chunk.len().next_multiple_of(2), 0);
    chunk
}

#[test]
fn what_is_no_such_image_is_refused() {
    const WRONG: (ErrorKind, &str) = (ErrorKind::InvalidImage, "INVALID_IMAGE_FORMAT");
    assert_eq!(refused(&[]), (ErrorKind::InvalidImage, "IMAGE_EMPTY"));
    for (bytes, word) in [
        (&b"<html><body>404</body></html>"[..], "HTML"),
        (b" <?xml version=\"1.0\"?><svg/>", "SVG"),
        (b"GIF89a", "GIF"),
        (b"BM\0\0", "BMP"),
        (b"II*\0", "TIFF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "AVIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "MP4"),
        (b"%PDF-1.7", "PDF"),
        (b"hello", "no known form"),
        (&[0; 1000], "no known form"),
    ] {
        assert_eq!(refused(bytes), WRONG);
        assert!(open(bytes).unwrap_err().to_string().contains(word), "{word}");
    }
}

#[test]
fn cut_off_images_are_refused() {
    for bytes in [encoded(picture(), ImageFormat::Png), jpeg(), encoded(picture(), ImageFormat::WebP)] {
        for len in [bytes.len() / 2, bytes.len() - 20, 40, 13] {
            assert_eq!(refused(&bytes[..len]), CORRUPT, "{len} of {} bytes", bytes.len());
        }
    }
}

#[test]
fn the_end_marker_of_a_thumbnail_does_not_count() {
    // An APP1 segment that holds a whole small JPEG, end marker included.
    let bytes = jpeg();
    let segment = [&[0xFF, 0xE1][..], &(2 + bytes.len() as u16).to_be_bytes(), &bytes].concat();
    let whole = [&bytes[..2], &segment, &bytes[2..]].concat();
    shows(&whole, &picture(), 12);
    assert_eq!(refused(&whole[..whole.len() - 30]), CORRUPT);
}

#[test]
fn garbled_images_are_refused_or_decoded_but_never_panic() {
    for bytes in [encoded(picture(), ImageFormat::Png), jpeg(), encoded(picture(), ImageFormat::WebP)] {
        let mut state = 1u32;
        for _ in 0..60 {
            let mut garbled = bytes.clone();
            for _ in 0..6 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let at = (state >> 8) as usize % garbled.len();
                garbled[at] = state as u8;
            }
            if let Err(error) = open(&garbled) {
                assert!(error.reason().is_some(), "{error}");
            }
        }
        let mut garbled = bytes.clone();
        let half = garbled.len() / 2;
        garbled[half / 2..].iter_mut().enumerate().for_each(|(i, b)| *b = (i * 97 + i / 5) as u8);
        assert_eq!(refused(&garbled), CORRUPT);
    }
}

#[test]
fn sides_area_and_shape_have_limits() {
    let header = |width, height| png(width, height, 8, 2, &[], &[]);
    assert_eq!(refused(&header(100_000, 20_000)), DIMENSIONS);
    assert_eq!(refused(&header(8193, 8193)), DIMENSIONS);
    assert_eq!(refused(&header(8000, 8000)), DIMENSIONS);
    assert_eq!(refused(&header(i32::MAX as u32, i32::MAX as u32)).0, ErrorKind::ImageTooLarge);
    assert_eq!(refused(&header(0, 0)), CORRUPT);
    assert_eq!(refused(&header(63, 100)), (ErrorKind::InvalidImage, "IMAGE_TOO_SMALL"));
    assert_eq!(refused(&header(8192, 64)), (ErrorKind::InvalidImage, "IMAGE_ASPECT"));
    assert_eq!(refused(&header(64, 257)), (ErrorKind::InvalidImage, "IMAGE_ASPECT"));
    assert!(open(&encoded(RgbImage::new(64, 256), ImageFormat::Png)).is_ok());
    // 36 megapixels fit with 3 bytes each, but not with 8.
    assert_eq!(refused(&png(6000, 6000, 16, 6, &[], &[])), DIMENSIONS);

    let mut wide = jpeg();
    let frame = wide.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
    wide[frame + 5..frame + 9].fill(0xFF);
    assert_eq!(refused(&wide), DIMENSIONS);
}

#[test]
fn the_file_has_a_limit() {
    let limits = Limits { max_bytes: 100, ..Limits::default() };
    let error = Portrait::open(&encoded(picture(), ImageFormat::Png), &limits).unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::ImageTooLarge, Some("IMAGE_TOO_LARGE")));
}
