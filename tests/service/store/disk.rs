//! A disk under SQLite that keeps a record of what was written and what was synchronised, can be too small, and
//! can break. It is SQLite's own layer over files with some of its functions replaced.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rusqlite::ffi;

/// What happened, in order.
#[derive(Clone, Debug)]
pub enum Event {
    Create(String),
    Delete(String),
    Write(String, usize, Vec<u8>),
    Truncate(String, usize),
    Sync(String),
    /// A promise was given to a client: this job is at least here.
    Promise(String, &'static str),
}

/// The disk; registered under its name for the whole life of the process.
pub struct Disk {
    pub name: String,
    events: Mutex<Vec<Event>>,
    /// Bytes that files may hold together.
    capacity: AtomicI64,
    sizes: Mutex<BTreeMap<String, i64>>,
    broken: AtomicBool,
}

impl Disk {
    /// A disk without limits, and its name for SQLite.
    pub fn new() -> Arc<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let disk = Arc::new(Self {
            name: format!("disk-{}", COUNT.fetch_add(1, Ordering::SeqCst)),
            events: Mutex::default(),
            capacity: AtomicI64::new(i64::MAX),
            sizes: Mutex::default(),
            broken: AtomicBool::new(false),
        });
        register(disk.clone());
        disk
    }

    pub fn set_capacity(&self, bytes: i64) {
        self.capacity.store(bytes, Ordering::SeqCst);
    }

    /// From now on, or not any more, every write and every synchronisation fails.
    pub fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::SeqCst);
    }

    pub fn promise(&self, job: &str, status: &'static str) {
        self.record(Event::Promise(job.to_string(), status));
    }

    pub fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }

    pub fn used(&self) -> i64 {
        self.sizes.lock().unwrap().values().sum()
    }

    fn record(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }

    /// Whether `name` may end at `end`.
    fn has_room(&self, name: &str, end: i64) -> bool {
        let mut sizes = self.sizes.lock().unwrap();
        let old = sizes.get(name).copied().unwrap_or(0);
        let used: i64 = sizes.values().sum();
        let has_room = end <= old || used - old + end <= self.capacity.load(Ordering::SeqCst);
        if has_room {
            sizes.insert(name.to_string(), old.max(end));
        }
        has_room
    }
}

#[repr(C)]
struct Layer {
    vfs: ffi::sqlite3_vfs,
    real: *mut ffi::sqlite3_vfs,
    disk: Arc<Disk>,
}

/// The functions of one open file, and what they need besides it.
#[repr(C)]
struct Methods {
    methods: ffi::sqlite3_io_methods,
    real: *const ffi::sqlite3_io_methods,
    disk: Arc<Disk>,
    name: String,
}

fn register(disk: Arc<Disk>) {
    let name = CString::new(disk.name.clone()).unwrap().into_raw();
    // SAFETY: the default layer lives as long as the process. The copy keeps its functions, which use the files
    // and not the layer that they are given. Both the copy and its name are leaked, since SQLite keeps them.
    unsafe {
        assert_eq!(ffi::sqlite3_initialize(), ffi::SQLITE_OK);
        let real = ffi::sqlite3_vfs_find(std::ptr::null());
        let mut vfs = *real;
        (vfs.zName, vfs.pNext) = (name, std::ptr::null_mut());
        vfs.xOpen = Some(open);
        vfs.xDelete = Some(delete);
        let layer = Box::into_raw(Box::new(Layer { vfs, real, disk }));
        assert_eq!(ffi::sqlite3_vfs_register(&raw mut (*layer).vfs, 0), ffi::SQLITE_OK);
    }
}

/// The last part of a path. SAFETY: `path` must be a string, as SQLite gives it.
unsafe fn file_name(path: *const c_char) -> String {
    let path = unsafe { CStr::from_ptr(path) }.to_str().unwrap();
    Path::new(path).file_name().unwrap().to_str().unwrap().to_string()
}

unsafe extern "C" fn open(
    vfs: *mut ffi::sqlite3_vfs,
    path: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    // SAFETY: `vfs` is the first field of a `Layer`, which is never freed; the other arguments are SQLite's own.
    unsafe {
        let layer = &*vfs.cast::<Layer>();
        let existed = !path.is_null() && Path::new(CStr::from_ptr(path).to_str().unwrap()).exists();
        let code = (*layer.real).xOpen.unwrap()(layer.real, path, file, flags, out);
        if code != ffi::SQLITE_OK || path.is_null() {
            return code;
        }
        let name = file_name(path);
        if !existed {
            layer.disk.record(Event::Create(name.clone()));
        }
        let real = (*file).pMethods;
        let mut methods = *real;
        methods.xClose = Some(close);
        methods.xWrite = Some(write);
        methods.xTruncate = Some(truncate);
        methods.xSync = Some(sync);
        let methods = Methods { methods, real, disk: layer.disk.clone(), name };
        (*file).pMethods = Box::into_raw(Box::new(methods)).cast();
        code
    }
}

unsafe extern "C" fn delete(vfs: *mut ffi::sqlite3_vfs, path: *const c_char, sync: c_int) -> c_int {
    // SAFETY: as in `open`.
    unsafe {
        let layer = &*vfs.cast::<Layer>();
        let code = (*layer.real).xDelete.unwrap()(layer.real, path, sync);
        if code == ffi::SQLITE_OK {
            let name = file_name(path);
            layer.disk.sizes.lock().unwrap().remove(&name);
            layer.disk.record(Event::Delete(name));
        }
        code
    }
}

/// What `open` has put in the place of a file's functions. SAFETY: `file` must have been opened by it.
unsafe fn methods<'a>(file: *mut ffi::sqlite3_file) -> &'a Methods {
    unsafe { &*(*file).pMethods.cast::<Methods>() }
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite closes a file once, and calls nothing on it afterwards.
    unsafe {
        let ours = Box::from_raw((*file).pMethods.cast_mut().cast::<Methods>());
        (*file).pMethods = ours.real;
        (*ours.real).xClose.unwrap()(file)
    }
}

unsafe extern "C" fn write(
    file: *mut ffi::sqlite3_file,
    data: *const c_void,
    len: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: `data` holds `len` bytes, says SQLite.
    unsafe {
        let ours = methods(file);
        if ours.disk.broken.load(Ordering::SeqCst) {
            return ffi::SQLITE_IOERR_WRITE;
        }
        if !ours.disk.has_room(&ours.name, offset + i64::from(len)) {
            return ffi::SQLITE_FULL;
        }
        let code = (*ours.real).xWrite.unwrap()(file, data, len, offset);
        if code == ffi::SQLITE_OK {
            let bytes = std::slice::from_raw_parts(data.cast::<u8>(), len as usize).to_vec();
            ours.disk.record(Event::Write(ours.name.clone(), offset as usize, bytes));
        }
        code
    }
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, size: ffi::sqlite3_int64) -> c_int {
    // SAFETY: see `methods`.
    unsafe {
        let ours = methods(file);
        let code = (*ours.real).xTruncate.unwrap()(file, size);
        if code == ffi::SQLITE_OK {
            ours.disk.sizes.lock().unwrap().insert(ours.name.clone(), size);
            ours.disk.record(Event::Truncate(ours.name.clone(), size as usize));
        }
        code
    }
}

unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, flags: c_int) -> c_int {
    // SAFETY: see `methods`.
    unsafe {
        let ours = methods(file);
        if ours.disk.broken.load(Ordering::SeqCst) {
            return ffi::SQLITE_IOERR_FSYNC;
        }
        let code = (*ours.real).xSync.unwrap()(file, flags);
        if code == ffi::SQLITE_OK {
            ours.disk.record(Event::Sync(ours.name.clone()));
        }
        code
    }
}
