//! Small media, sound and broken, made on the spot.

/// A PNG of `width` × `height` grey pixels.
pub fn png(width: u32, height: u32) -> Vec<u8> {
    let row: Vec<u8> = std::iter::once(0).chain((0..width * 3).map(|i| (i % 251) as u8)).collect();
    png_of(width, height, &row.repeat(height as usize))
}

/// A PNG whose header says `width` × `height` and whose pixel data are `raw`, uncompressed.
pub fn png_of(width: u32, height: u32, raw: &[u8]) -> Vec<u8> {
    let mut header = [width.to_be_bytes(), height.to_be_bytes()].concat();
    header.extend([8, 2, 0, 0, 0]); // 8 bits, RGB
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    for (name, data) in [(b"IHDR", header), (b"IDAT", stored_zlib(raw)), (b"IEND", vec![])] {
        let named = [name.as_slice(), &data].concat();
        file.extend((data.len() as u32).to_be_bytes());
        file.extend(&named);
        file.extend(crc32(&named).to_be_bytes());
    }
    file
}

/// A zlib stream of stored blocks.
fn stored_zlib(raw: &[u8]) -> Vec<u8> {
    let mut stream = vec![0x78, 0x01];
    let blocks: Vec<_> = raw.chunks(0xffff).collect();
    for (i, block) in blocks.iter().enumerate() {
        let len = block.len() as u16;
        stream.push(u8::from(i + 1 == blocks.len()));
        stream.extend(len.to_le_bytes());
        stream.extend((!len).to_le_bytes());
        stream.extend(*block);
    }
    let (a, b) = raw.iter().fold((1u32, 0u32), |(a, b), byte| {
        let a = (a + u32::from(*byte)) % 65521;
        (a, (a + b) % 65521)
    });
    stream.extend((b << 16 | a).to_be_bytes());
    stream
}

/// The checksum of PNG chunks.
pub fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1)))
    })
}

/// How the samples of a WAV are stored.
#[derive(Clone, Copy)]
pub enum Samples {
    /// 16-bit integers.
    Int16,
    /// 32-bit floating point.
    Float32,
}

/// A WAV with this head before `data`.
pub fn wav(rate_hz: u32, channels: u16, samples: Samples, data: &[u8]) -> Vec<u8> {
    let (format, bytes): (u16, u16) = match samples {
        Samples::Int16 => (1, 2),
        Samples::Float32 => (3, 4),
    };
    let frame = channels.wrapping_mul(bytes);
    let mut file = b"RIFF".to_vec();
    file.extend((36 + data.len() as u32).to_le_bytes());
    file.extend(b"WAVEfmt ");
    file.extend(16u32.to_le_bytes());
    file.extend(format.to_le_bytes());
    file.extend(channels.to_le_bytes());
    file.extend(rate_hz.to_le_bytes());
    file.extend(rate_hz.wrapping_mul(frame.into()).to_le_bytes());
    file.extend(frame.to_le_bytes());
    file.extend((bytes * 8).to_le_bytes());
    file.extend(b"data");
    file.extend((data.len() as u32).to_le_bytes());
    file.extend(data);
    file
}

/// A WAV of `seconds` of a 220 Hz tone in every channel.
pub fn tone(rate_hz: u32, channels: u16, seconds: f64) -> Vec<u8> {
    let frames = (f64::from(rate_hz) * seconds) as usize;
    let sample = |i: usize| {
        let phase = i as f64 / f64::from(rate_hz) * 220.0 * std::f64::consts::TAU;
        (phase.sin() * 8000.0) as i16
    };
    let data: Vec<u8> = (0..frames).flat_map(|i| sample(i).to_le_bytes().repeat(channels.into())).collect();
    wav(rate_hz, channels, Samples::Int16, &data)
}

/// Bytes that are nothing: the same ones in every run.
pub fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491u32;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}
