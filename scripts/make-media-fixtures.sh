#!/bin/sh
# Makes the small audio files in tests/media with ffmpeg (5.1; libmp3lame, libvorbis and libopus built in).
# All hold the same 0.4 s sweep that starts 0.1 s in; `sweep` in src/media/audio/voice_tests.rs computes it.
set -eu
cd "$(dirname "$0")/../tests/media"

sweep() { # rate, then ffmpeg's output options and file
    rate=$1
    shift
    ffmpeg -nostdin -v error -y -f lavfi \
        -i "aevalsrc=exprs='if(gte(t,0.1),0.5*sin(2*PI*(150+2000*t)*t),0)':s=$rate:d=0.5" \
        -map_metadata -1 -fflags +bitexact -flags:a +bitexact "$@"
}

sweep 8000 -c:a pcm_s16be sweep-8000.aiff
sweep 8000 -c:a adpcm_ima_wav sweep-8000-adpcm.wav
sweep 8000 -c:a flac -sample_fmt s16 sweep-8000.flac
sweep 44100 -c:a libmp3lame -b:a 64k sweep-44100.mp3
sweep 44100 -c:a aac -b:a 64k sweep-44100-aac.m4a
sweep 44100 -c:a aac -b:a 64k -movflags +frag_keyframe+delay_moov sweep-44100-fragmented.m4a
sweep 8000 -c:a alac -sample_fmt s16p sweep-8000-alac.m4a
sweep 44100 -c:a libvorbis -q:a 2 sweep-44100-vorbis.ogg
sweep 48000 -c:a libopus -b:a 48k sweep-48000-opus.ogg
sweep 48000 -c:a libopus -b:a 48k sweep-48000-opus.webm
sweep 48000 -c:a libopus -b:a 48k -live 1 sweep-48000-opus-live.webm
sweep 48000 -c:a libopus -b:a 48k -strict -2 sweep-48000-opus.mp4
# A video without sound.
ffmpeg -nostdin -v error -y -f lavfi -i testsrc=d=0.2:s=64x64:r=10 -an -c:v libx264 -preset ultrafast -crf 45 \
    -fflags +bitexact -flags:v +bitexact video-only.mp4
# JPEGs that our encoder does not write: left half red, right half blue (python3 with Pillow).
"${PYTHON:-python3}" - <<'PYTHON'
from PIL import Image

halves = Image.new("RGB", (96, 64), (254, 0, 0))
halves.paste((0, 0, 254), (48, 0, 96, 64))
halves.save("halves-progressive.jpg", quality=95, subsampling=0, progressive=True)
halves.convert("CMYK").save("halves-cmyk.jpg", quality=95, subsampling=0)
PYTHON
