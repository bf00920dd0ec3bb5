//! `handler keys`: the keys of the gateway.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::serve::{data_dir, make_private};
use crate::gateway::key;
use crate::gateway::store::{KeyRecord, KeyRole, KeyStore};
use crate::job::{Code, JobError};

/// Letters of a key's id; 62 bits, so that ids do not meet.
const ID_BYTES: usize = 8;
/// The longest name of a key, in characters.
const NAME_CHARS: usize = 100;

/// Flags of the verb.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// The gateway's folder [default: $XDG_DATA_HOME/talkie, else ~/.local/share/talkie]
    #[arg(long, global = true, env = "DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(subcommand)]
    action: Action,
}

#[derive(Clone, Debug, Subcommand)]
enum Action {
    /// Make a key; it is shown this once
    Create {
        /// What it is for, in your words
        #[arg(long, env = "KEY_NAME", value_name = "NAME")]
        name: String,
        /// What it opens: the endpoint API, or the side of workers
        #[arg(long, env = "KEY_ROLE", value_enum, default_value_t)]
        role: Role,
    },
    /// List the keys, without their secrets
    List,
    /// End a key; a running gateway heeds it at once
    Revoke {
        /// The id, as `list` shows it
        id: String,
    },
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Role {
    #[default]
    Client,
    Worker,
}

pub(super) fn run(args: &Args) -> Result<Value, JobError> {
    let dir = data_dir(args.data_dir.as_deref(), |name| std::env::var_os(name).map(PathBuf::from))?;
    make_private(&dir)?;
    let keys = KeyStore::open(&dir)?;
    match &args.action {
        Action::Create { name, role } => create(&keys, name, *role),
        Action::List => Ok(json!({"keys": keys.list()?.iter().map(show).collect::<Vec<_>>()})),
        Action::Revoke { id } => revoke(&keys, id),
    }
}

fn create(keys: &KeyStore, name: &str, role: Role) -> Result<Value, JobError> {
    let name = name.trim();
    if name.is_empty() || name.chars().count() > NAME_CHARS {
        let message = format!("`--name` has {} characters, expected 1 to {NAME_CHARS}", name.chars().count());
        return Err(JobError::new(Code::InvalidInput, message).with_reason("USAGE"));
    }
    let role = match role {
        Role::Client => KeyRole::Client,
        Role::Worker => KeyRole::Worker,
    };
    let (id, secret) = (hex::encode(rand::random::<[u8; ID_BYTES]>()), key::generate());
    let mut shown = show(&keys.create(&id, name, role, key::hash(secret.expose()))?);
    shown["key"] = secret.expose().into();
    Ok(shown)
}

fn revoke(keys: &KeyStore, id: &str) -> Result<Value, JobError> {
    let ended = keys.revoke(id)?;
    let found = keys.list()?.into_iter().find(|key| key.id == id);
    match found {
        // One that has ended before stays as it is.
        Some(key) => {
            let mut shown = show(&key);
            shown["revoked_now"] = ended.into();
            Ok(shown)
        }
        None => {
            let message = format!("there is no key {id:?}");
            Err(JobError::new(Code::NotFound, message).with_hint("`handler keys list` shows the ids"))
        }
    }
}

fn show(key: &KeyRecord) -> Value {
    json!({
        "id": key.id,
        "name": key.name,
        "role": match key.role { KeyRole::Client => "client", KeyRole::Worker => "worker" },
        "created_at": moment(key.created_ms),
        "revoked_at": key.revoked_ms.map(moment),
    })
}

/// Milliseconds since 1970 as RFC 3339.
fn moment(ms: i64) -> Option<String> {
    OffsetDateTime::from_unix_timestamp(ms / 1000).ok()?.format(&Rfc3339).ok()
}
