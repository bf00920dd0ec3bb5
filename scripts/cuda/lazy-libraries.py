#!/usr/bin/env python3
"""Stand-ins for NVIDIA's shared libraries: static archives that open the real library at the first call.

    scripts/cuda/lazy-libraries.py CUDARC_SOURCE FOLDER

A binary linked with libcuda.a, libcublas.a … in FOLDER names no NVIDIA library in its header, so it starts on a
machine without them. Each function jumps through a table. At the first call, the table's entry leads to a resolver that
opens the library, looks the function up and enters it in the table; where there is no library or no such function, the
entry becomes one that returns the library's own code for that. The functions are those that cudarc declares, read from
its source, so that they follow its upgrades. For x86-64 Linux.
"""
import pathlib, re, subprocess, sys

# Archive, module of cudarc, names to open in this order, code of a call that cannot be made: no device, not
# initialised, initialisation failed, no compiler.
LIBRARIES = [
    ("cuda", "driver", ["libcuda.so.1"], 100),
    ("cublas", "cublas", ["libcublas.so.13"], 1),
    ("cublasLt", "cublaslt", ["libcublasLt.so.13"], 1),
    ("curand", "curand", ["libcurand.so.10"], 101),
    ("nvrtc", "nvrtc", ["libnvrtc.so.13"], 4),
]

# The registers that carry arguments; the count keeps the stack aligned to 16 bytes together with the vectors' 136.
REGISTERS = ["rdi", "rsi", "rdx", "rcx", "r8", "r9", "rax"]


def declared(source):
    """The functions of one library in cudarc's bindings."""
    return sorted(set(re.findall(r"\bfn (cu\w+|nvrtc\w+)\s*\(", source)) - {"culib"})


def assembler(library, functions):
    """The functions, each a jump through its entry of the table, and the way to the resolver."""
    table, first_call = f"talkie_{library}_table", f"talkie_{library}_first_call"
    save = [f"pushq %{r}" for r in REGISTERS] + ["subq $136, %rsp"] + [f"movups %xmm{i}, {16 * i}(%rsp)" for i in range(8)]
    load = [f"movups {16 * i}(%rsp), %xmm{i}" for i in range(8)] + ["addq $136, %rsp"] + [f"popq %{r}" for r in reversed(REGISTERS)]
    lines = [".text"]
    for i, name in enumerate(functions):
        lines += [f".globl {name}", f".type {name}, @function", f"{name}:", f"jmp *{table}+{8 * i}(%rip)",
                  f".L{i}: pushq ${i}", f"jmp {first_call}", f".size {name}, .-{name}"]
    # The number lies above the saved registers; afterwards the stack is that of the call.
    lines += [f"{first_call}:", *save, f"movq {136 + 8 * len(REGISTERS)}(%rsp), %rdi", f"call talkie_{library}_resolve",
              "movq %rax, %r11", *load, "addq $8, %rsp", "jmp *%r11"]
    entries = [f".quad .L{i}" for i in range(len(functions))]
    lines += [".data", ".balign 8", f".globl {table}", f".hidden {table}", f"{table}:", *entries,
              '.section .note.GNU-stack, "", @progbits', ""]
    return "\n".join(lines)


def resolver(library, functions, names, code):
    quoted = lambda texts: ", ".join(f'"{text}"' for text in texts)
    return f"""
#include <dlfcn.h>
#include <pthread.h>
static const char *const functions[] = {{{quoted(functions)}}};
static const char *const names[] = {{{quoted(names)}}};
static void *library;
static pthread_once_t once = PTHREAD_ONCE_INIT;
extern void *talkie_{library}_table[] __attribute__((visibility("hidden")));
static void open_library(void) {{
    for (unsigned i = 0; i < sizeof names / sizeof *names && !library; i++)
        library = dlopen(names[i], RTLD_NOW | RTLD_GLOBAL);
}}
static int missing(void) {{ return {code}; }}
__attribute__((visibility("hidden"))) void *talkie_{library}_resolve(long i) {{
    pthread_once(&once, open_library);
    void *function = library ? dlsym(library, functions[i]) : 0;
    if (!function) function = (void *)missing;
    __atomic_store_n(&talkie_{library}_table[i], function, __ATOMIC_RELEASE);
    return function;
}}
"""


def main():
    source, folder = map(pathlib.Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    for library, module, names, code in LIBRARIES:
        functions = declared((source / "src" / module / "sys" / "mod.rs").read_text())
        if not functions:
            sys.exit(f"{source} declares no function of {library}: its layout has changed")
        objects = []
        for kind, text in (("S", assembler(library, functions)), ("c", resolver(library, functions, names, code))):
            part = folder / f"{library}.{kind}"
            part.write_text(text)
            objects.append(folder / f"{library}_{kind}.o")
            subprocess.check_call(["cc", "-O2", "-fPIC", "-c", part, "-o", objects[-1]])
            part.unlink()
        archive = folder / f"lib{library}.a"
        archive.unlink(missing_ok=True)
        subprocess.check_call(["ar", "rcs", archive, *objects])
        for part in objects:
            part.unlink()


if __name__ == "__main__":
    main()
