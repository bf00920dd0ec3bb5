//! What encoding and decoding costs: operations and bytes, from the shapes alone.
//!
//! Both walk the layers as `encoder` and `decoder` do. The bytes are those of one chunk: the frames of the past that
//! all layers keep, and the most that is alive inside of a layer at once.

use super::{CHUNK_FRAMES, Config};

/// Frames that a convolution over three keeps for the next chunk.
const PAST_FRAMES: usize = 2;

/// What a network costs for chunks of four frames.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Multiplications and additions of one chunk.
    pub flops: f64,
    /// The most values alive at once.
    pub values: u64,
}

/// Adds up layers: `frames` frames of `area` pixels at a time.
#[derive(Default)]
struct Walk {
    frames: usize,
    area: usize,
    flops: f64,
    kept: usize,
    most: usize,
}

impl Walk {
    /// `alive` values per frame and pixel.
    fn alive(&mut self, per_pixel: usize) {
        self.most = self.most.max(self.frames * self.area * per_pixel);
    }

    /// A convolution of `taps` taps per output, by frame and pixel.
    fn conv(&mut self, taps: usize, input: usize, output: usize) {
        self.flops += 2.0 * (taps * input * output) as f64 * (self.frames * self.area) as f64;
    }

    /// A convolution over three frames.
    fn causal(&mut self, taps: usize, input: usize, output: usize) {
        self.conv(taps, input, output);
        self.kept += PAST_FRAMES * self.area * input;
    }

    fn residual(&mut self, input: usize, output: usize) {
        self.causal(27, input, output);
        self.causal(27, output, output);
        let shortcut = if input == output { input } else { output };
        if input != output {
            self.conv(1, input, output);
        }
        // Normalised input, shortcut, output; then the same of the second convolution.
        self.alive((input + shortcut + output).max(shortcut + 2 * output));
    }

    fn middle(&mut self, channels: usize) {
        self.residual(channels, channels);
        self.conv(1, channels, 4 * channels);
        self.flops += 4.0 * (self.frames * channels) as f64 * (self.area as f64).powi(2);
        // Input, norm, q, k and v, the keys transposed, the result.
        self.alive(7 * channels);
        self.residual(channels, channels);
    }

    fn cost(self) -> Cost {
        Cost { flops: self.flops, values: (self.kept + self.most) as u64 }
    }
}

impl Config {
    /// Decoding latents to frames of `height` × `width`.
    pub fn decode_cost(&self, height: usize, width: usize) -> Cost {
        let levels = self.dim_mult.len();
        let lowest = self.dim * self.dim_mult.last().copied().unwrap_or(1);
        let mut walk = Walk { frames: 1, area: (height * width) >> (2 * (levels - 1)), ..Walk::default() };
        walk.causal(27, self.z_dim, lowest);
        walk.middle(lowest);
        let mut channels = lowest;
        for (level, mult) in self.dim_mult.iter().enumerate().rev() {
            for _ in 0..=self.num_res_blocks {
                walk.residual(channels, self.dim * mult);
                channels = self.dim * mult;
            }
            if level > 0 {
                if self.temperal_downsample[level - 1] {
                    walk.causal(3, channels, 2 * channels);
                    // Input, twice as many channels, and those as twice as many frames.
                    walk.alive(5 * channels);
                    walk.frames *= 2;
                }
                walk.area *= 4;
                walk.conv(9, channels, channels / 2);
                walk.alive(channels / 4 + channels / 2);
                channels /= 2;
            }
        }
        walk.causal(27, channels, 3);
        walk.alive(2 * channels);
        walk.cost()
    }

    /// Encoding frames of `height` × `width`.
    pub fn encode_cost(&self, height: usize, width: usize) -> Cost {
        let mut walk = Walk { frames: CHUNK_FRAMES, area: height * width, ..Walk::default() };
        walk.causal(27, 3, self.dim);
        walk.alive(3 + self.dim);
        let mut channels = self.dim;
        for (level, mult) in self.dim_mult.iter().enumerate() {
            for _ in 0..self.num_res_blocks {
                walk.residual(channels, self.dim * mult);
                channels = self.dim * mult;
            }
            if let Some(&temporal) = self.temperal_downsample.get(level) {
                walk.alive(channels + channels / 4);
                walk.area /= 4;
                walk.conv(9, channels, channels);
                if temporal {
                    walk.kept += walk.area * channels;
                    walk.frames /= 2;
                    walk.conv(3, channels, channels);
                }
            }
        }
        walk.middle(channels);
        walk.causal(27, channels, 2 * self.z_dim);
        walk.cost()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_network_costs_what_its_layers_add_up_to() {
        let cfg = Config::wan2_1();
        let unit = 4.0 * 640.0 * 640.0 * 96.0;
        let decode = cfg.decode_cost(640, 640);
        // Three residual blocks at full resolution, six convolutions of 27 · 96 · 96 each, are a third of it.
        let full = 6.0 * 2.0 * 27.0 * 96.0 * unit;
        assert!((2.5..3.5).contains(&(decode.flops / full)), "{}", decode.flops / full);
        // Six slots of two frames and a head's at full resolution, half as much and less below, three tensors alive.
        assert!((9.0..11.0).contains(&(decode.values as f64 / unit)), "{}", decode.values as f64 / unit);
        let encode = cfg.encode_cost(640, 640);
        assert!(encode.flops < decode.flops && encode.values < decode.values);
    }
}
