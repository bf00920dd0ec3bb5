//! JSON Schema of the input, made from the parser's own table of fields, and of the output.

use serde_json::{Map, Value, json};
use talkie::request::{FIELDS, Field, Kind, Medium, NAME_CHARS, Role};

const DIALECT: &str = "https://json-schema.org/draft/2020-12/schema";

/// The schema of the object that stands under `input`.
pub fn input() -> Value {
    let mut schema = object(FIELDS);
    schema["$schema"] = DIALECT.into();
    schema["title"] = "Talkie input".into();
    let required = FIELDS.iter().filter(|f| f.role == Role::Required);
    schema["allOf"] = required.map(|field| json!({"anyOf": ways_to_give(field)})).collect();
    schema
}

/// The schema of a job's output.
pub fn output() -> Value {
    let text = |about: &str| json!({"type": "string", "description": about});
    let count = |about: &str| json!({"type": "integer", "minimum": 0, "description": about});
    let lines = |about: &str| json!({"type": "array", "items": {"type": "string"}, "description": about});
    let ms = |names: &[&str]| -> Map<String, Value> {
        names.iter().map(|name| (name.to_string(), count("milliseconds"))).collect()
    };
    let mut cold_start = ms(&["boot_ms", "fetch_ms", "load_ms", "read_ms", "convert_ms", "to_device_ms"]);
    cold_start.append(&mut ms(&["first_step_ms"]));
    cold_start.insert("bytes_read".to_string(), count("bytes of weight files that were read"));
    let rate = json!({"type": "number", "minimum": 0, "description": "10^9 bytes of weights a second"});
    cold_start.insert("gb_per_s".to_string(), rate);
    let cold_start = json!({"type": "object", "properties": cold_start});
    let mut timings = ms(&["inputs_ms", "audio_ms", "encode_ms", "denoise_ms", "per_step_ms"]);
    timings.insert("cold_start".to_string(), cold_start);
    timings.append(&mut ms(&["decode_ms", "mux_ms", "upload_ms", "total_ms"]));
    json!({
        "$schema": DIALECT,
        "title": "Talkie output",
        "type": "object",
        "properties": {
            "video_url": text("where the video can be fetched"),
            "video_path": text("the video as a local file; command line only"),
            "expires_at": text("when video_url ends, RFC 3339"),
            "bucket": text("bucket of the object"),
            "key": text("key of the object"),
            "size_bytes": count("bytes of the file"),
            "sha256": text("SHA-256 of the file, hexadecimal"),
            "duration_s": {"type": "number", "description": "length of the video in seconds"},
            "frames": count("frames in the video"),
            "fps": {"const": 25},
            "width": count("pixels"),
            "height": count("pixels"),
            "seed": count("the seed that was used, given or drawn"),
            "model": text("the profile that was used"),
            "preset": text("the preset that was asked for"),
            "thumbnail_url": text("where the JPEG of the first frame can be fetched"),
            "downgrades": lines("what was lowered to make the video at all"),
            "warnings": lines("what the sender should know"),
            "timings": {"type": "object", "properties": timings},
            "peak_memory": {
                "type": "object",
                "properties": {"host_bytes": count("bytes"), "device_bytes": count("bytes")},
            },
            "manifest_url": text("where the manifest can be fetched"),
        },
        "required": ["video_url", "size_bytes", "sha256", "duration_s", "frames", "fps", "width", "height", "seed",
                     "model", "downgrades", "warnings", "timings", "peak_memory"],
    })
}

fn object(fields: &[Field]) -> Value {
    let mut properties = Map::new();
    for field in fields.iter().filter(|f| f.role != Role::Refused) {
        properties.insert(field.name.to_string(), property(field));
        for alias in field.aliases {
            let mut same = property(field);
            same["description"] = format!("Another name of `{}`", field.name).into();
            same["deprecated"] = true.into();
            properties.insert(alias.to_string(), same);
        }
    }
    json!({"type": "object", "properties": properties, "additionalProperties": false})
}

fn property(field: &Field) -> Value {
    if field.role == Role::Ignored {
        return json!({"deprecated": true, "description": format!("Ignored: {}", field.about)});
    }
    let mut schema = match field.kind {
        Kind::Media(medium) => json!({"type": "string", "contentMediaType": media_type(medium)}),
        Kind::Text(most) => json!({"type": "string", "maxLength": most}),
        Kind::Name => json!({"type": "string", "pattern": format!("^[A-Za-z0-9._-]{{1,{NAME_CHARS}}}$")}),
        Kind::Choice { values, synonyms } => {
            let others: Vec<_> = synonyms.iter().map(|(from, _)| from).collect();
            let mut forms = vec![json!({"enum": values}), json!({"enum": others, "deprecated": true})];
            if field.name == "size" {
                forms.push(json!({"type": "string", "pattern": "^[0-9]+[x*][0-9]+$", "deprecated": true}));
                forms.push(json!({"enum": [480, 720], "deprecated": true}));
            }
            json!({ "anyOf": forms })
        }
        Kind::Integer { min, max } => json!({"type": "integer", "minimum": min, "maximum": max}),
        Kind::Frames { min, max } => {
            json!({"type": "integer", "minimum": min, "maximum": max, "$comment": "4n+1"})
        }
        Kind::Number { min, max } => json!({"type": "number", "minimum": min, "maximum": max}),
        Kind::Flag => json!({"type": "boolean"}),
        Kind::Boxes => boxes(),
        Kind::Object(fields) => object(fields),
    };
    schema["description"] = field.about.into();
    if matches!(field.role, Role::InsteadOf(_)) {
        schema["deprecated"] = true.into();
    }
    schema
}

fn media_type(medium: Medium) -> &'static str {
    match medium {
        Medium::Image => "image/*",
        Medium::Audio => "audio/*",
    }
}

fn boxes() -> Value {
    let side = json!({"type": "integer", "minimum": 0, "maximum": 65535});
    let one = json!({"type": "array", "items": side, "minItems": 4, "maxItems": 4});
    json!({"anyOf": [
        {
            "type": "object",
            "properties": {"person1": one, "person2": one},
            "required": ["person1", "person2"],
            "additionalProperties": false,
        },
        {"type": "array", "items": one, "minItems": 2, "maxItems": 2, "deprecated": true},
    ]})
}

/// One condition for each name under which `field` can be given.
fn ways_to_give(field: &Field) -> Vec<Value> {
    let replacements = FIELDS.iter().filter(|f| f.role == Role::InsteadOf(field.name));
    let names = std::iter::once(field.name).chain(field.aliases.iter().copied());
    names.chain(replacements.map(|f| f.name)).map(|name| json!({"required": [name]})).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{ColdStart, JobOutput, PeakMemory, Timings};

    /// The names of `value`'s fields, at every depth.
    fn names(value: &Value) -> Vec<String> {
        let Value::Object(fields) = value else { return Vec::new() };
        let below = |(name, value): (&String, &Value)| {
            let inner = names(value).into_iter().map(|inner| format!("{name}.{inner}")).collect::<Vec<_>>();
            std::iter::once(name.clone()).chain(inner).collect::<Vec<_>>()
        };
        fields.iter().flat_map(below).collect()
    }

    /// The names that a schema lists, at every depth.
    fn listed(schema: &Value) -> Vec<String> {
        let Some(properties) = schema["properties"].as_object() else { return Vec::new() };
        let below = |(name, schema): (&String, &Value)| {
            let inner = listed(schema).into_iter().map(|inner| format!("{name}.{inner}")).collect::<Vec<_>>();
            std::iter::once(name.clone()).chain(inner).collect::<Vec<_>>()
        };
        properties.iter().flat_map(below).collect()
    }

    #[test]
    fn the_output_schema_lists_what_an_output_has() {
        let some = || Some(String::new());
        let full = JobOutput {
            video_path: some(),
            expires_at: some(),
            bucket: some(),
            key: some(),
            preset: some(),
            thumbnail_url: some(),
            manifest_url: some(),
            timings: Timings { upload_ms: Some(0), cold_start: ColdStart::default(), ..Timings::default() },
            peak_memory: PeakMemory { host_bytes: Some(0), device_bytes: Some(0) },
            ..JobOutput::default()
        };
        let (mut have, mut say) = (names(&serde_json::to_value(full).unwrap()), listed(&output()));
        have.sort();
        say.sort();
        assert_eq!(have, say);
        let least = serde_json::to_value(JobOutput::default()).unwrap();
        let required: Vec<_> = least.as_object().unwrap().keys().map(|k| Value::from(k.as_str())).collect();
        assert_eq!(output()["required"], Value::from(required));
    }

    #[test]
    fn the_input_schema_knows_every_name_that_the_parser_knows() {
        let schema = input();
        for field in FIELDS.iter().filter(|f| f.role != Role::Refused) {
            for name in std::iter::once(field.name).chain(field.aliases.iter().copied()) {
                assert!(schema["properties"][name].is_object(), "{name}");
            }
        }
        assert!(schema["properties"]["video_url"].is_null(), "a refused field is not offered");
        assert_eq!(schema["properties"]["steps"]["maximum"], 100);
        assert_eq!(schema["allOf"].as_array().map(Vec::len), Some(2), "image and audio are required");
    }
}
