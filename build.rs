//! With the feature `cuda`, compiles the kernels of `kernels/` by the nvcc of `CUDA_HOME`, which
//! `scripts/build-cuda.sh` sets: a folder that holds CUDA, CUTLASS and the headers of FlashAttention.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, thread};

/// Machine code for Ampere and Ada.
const AMPERE: &str = "-gencode=arch=compute_80,code=sm_80";
const ADA: &str = "-gencode=arch=compute_89,code=sm_89";
/// Machine code for Hopper, and what the driver of a later card compiles.
const HOPPER_AND_LATER: &str = "-gencode=arch=compute_90,code=[sm_90,compute_90]";
/// What the driver of a card after Hopper compiles.
const LATER: &str = "-gencode=arch=compute_90,code=compute_90";
/// Machine code with the instructions that Hopper alone has.
const HOPPER_ONLY: &str = "-gencode=arch=compute_90a,code=sm_90a";

/// The kernels that are left out of FlashAttention 2: what they do is not asked for.
const FLASH_2: [&str; 5] = [
    "-DFLASHATTENTION_DISABLE_ALIBI",
    "-DFLASHATTENTION_DISABLE_LOCAL",
    "-DFLASHATTENTION_DISABLE_SOFTCAP",
    "-DFLASHATTENTION_DISABLE_UNEVEN_K",
    "-DFLASHATTENTION_DISABLE_DROPOUT",
];

/// What FlashAttention's own build passes for its arithmetic.
const FLASH: [&str; 9] = [
    "--use_fast_math",
    "--expt-extended-lambda",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT162_OPERATORS__",
    "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
];

/// One source, and how it is compiled.
struct Source {
    name: &'static str,
    targets: &'static [&'static str],
    /// Folders of `CUDA_HOME` beside its own headers.
    headers: &'static [&'static str],
    flags: Vec<&'static str>,
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    let Some(cuda) = env::var_os("CUDA_HOME").map(PathBuf::from) else {
        return Err(
            "the feature `cuda` needs CUDA_HOME: scripts/build-cuda.sh makes one and builds with it".into()
        );
    };
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let ampere_on = &[AMPERE, ADA, HOPPER_AND_LATER];
    let sources = [
        Source { name: "fused", targets: ampere_on, headers: &[], flags: vec![] },
        Source { name: "conv", targets: ampere_on, headers: &["cutlass"], flags: vec![] },
        Source {
            name: "flash_sm80",
            targets: &[AMPERE, ADA, LATER],
            headers: &["flash2", "cutlass"],
            flags: [&FLASH[..], &FLASH_2].concat(),
        },
        Source {
            name: "flash_sm90",
            targets: &[HOPPER_ONLY],
            headers: &["flash3", "cutlass"],
            flags: [&FLASH[..], &["--ptxas-options=--register-usage-level=10"]].concat(),
        },
    ];
    let objects = thread::scope(|scope| {
        let compiling: Vec<_> =
            sources.iter().map(|source| scope.spawn(|| compile(source, &cuda, &out))).collect();
        let join = |thread: thread::ScopedJoinHandle<_>| match thread.join() {
            Ok(compiled) => compiled,
            Err(_) => Err("a compiler's thread panicked".to_string()),
        };
        compiling.into_iter().map(join).collect::<Result<Vec<PathBuf>, String>>()
    })?;
    let archive = out.join("libtalkie_kernels.a");
    // An archive keeps members that are no longer added to it.
    let _ = std::fs::remove_file(&archive);
    run(Command::new("ar").arg("crs").arg(&archive).args(&objects))?;
    println!("cargo:rustc-link-search=native={}", out.display());
    println!("cargo:rustc-link-lib=static=talkie_kernels");
    println!("cargo:rustc-link-search=native={}", cuda.join("lib64").display());
    println!("cargo:rustc-link-lib=dylib=cudart");
    println!("cargo:rustc-link-lib=dylib=stdc++");
    Ok(())
}

fn compile(source: &Source, cuda: &Path, out: &Path) -> Result<PathBuf, String> {
    let object = out.join(source.name).with_extension("o");
    let include = |folder| format!("-I{}", cuda.join(folder).display());
    run(Command::new(cuda.join("bin/nvcc"))
        .args(["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-Ikernels"])
        .args(source.targets)
        .args(source.headers.iter().map(include))
        .args(&source.flags)
        .arg("-c")
        .arg(Path::new("kernels").join(source.name).with_extension("cu"))
        .arg("-o")
        .arg(&object))?;
    Ok(object)
}

fn run(command: &mut Command) -> Result<(), String> {
    let status = command.status().map_err(|e| format!("{command:?}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}")) }
}
