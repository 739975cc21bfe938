//! Values that are written as text. Each is checked while it is read, so that an error in a TOML file has a line.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use pool_domain::{DeviceMask, EngineName, ModelRef, PoolId};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

/// A year: longer times are slips of the pen, and far from any overflow.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

trait Text: Sized {
    const EXPECTED: &'static str;
    fn read(text: &str) -> Result<Self, String>;
}

struct TextVisitor<T>(PhantomData<T>);

impl<T: Text> Visitor<'_> for TextVisitor<T> {
    type Value = T;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        T::read(text).map_err(E::custom)
    }
}

macro_rules! texts {
    ($($(#[$doc:meta])* $ty:ident => $inner:ty, $expected:literal, $read:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $ty {
            text: String,
            value: $inner,
        }

        impl $ty {
            /// Reads it.
            ///
            /// # Errors
            /// When the text is not of the form; the message says what would be.
            pub fn parse(text: &str) -> Result<Self, String> {
                let read: fn(&str) -> Result<$inner, String> = $read;
                Ok(Self { text: text.to_owned(), value: read(text)? })
            }

            /// The text as it was written.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.text
            }

            /// What it means.
            #[must_use]
            pub fn value(&self) -> &$inner {
                &self.value
            }

            /// What it means.
            #[must_use]
            pub fn into_value(self) -> $inner {
                self.value
            }
        }

        impl Text for $ty {
            const EXPECTED: &'static str = $expected;
            fn read(text: &str) -> Result<Self, String> {
                Self::parse(text)
            }
        }

        impl<'de> Deserialize<'de> for $ty {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                d.deserialize_str(TextVisitor(PhantomData))
            }
        }

        impl Serialize for $ty {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.text)
            }
        }

        impl JsonSchema for $ty {
            fn schema_name() -> Cow<'static, str> {
                stringify!($ty).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "description": $expected })
            }
        }
    )*};
}

texts! {
    /// A length of time, `"10m"`.
    DurationText => Duration, "a time such as \"500ms\", \"2s\" or \"10m\"", duration;
    /// A number of bytes, `"24 GiB"`.
    SizeText => u64, "a size such as \"24 GiB\" or \"800 MiB\"", size;
    /// `"auto"` (no value) or a number of bytes, `"24 GiB"`.
    VramText => Option<u64>, "\"auto\" or a size such as \"24 GiB\"",
        |t| if t == "auto" { Ok(None) } else { size(t).map(Some).map_err(|e| format!("{e}, or \"auto\"")) };
    /// The devices of one engine.
    MaskText => DeviceMask, "a device mask such as \"auto\", \"all\", \"0,1\" or full GPU-… or MIG-… UUIDs",
        |t| DeviceMask::parse(t).map_err(|e| e.to_string());
    /// Where a model comes from.
    ModelText => ModelRef, "a model reference such as \"/srv/models/a.gguf\", \"hf:ORG/REPO/FILE\" or \"stub:NAME\"",
        |t| t.parse().map_err(|e: pool_domain::model_ref::ModelRefError| e.to_string());
    /// The name of a pool.
    PoolIdText => PoolId, "a pool id: letters, digits, '-', '_' and '.', at most 64",
        |t| t.parse().map_err(|e: pool_domain::id::IdError| e.to_string());
    /// The name of an engine.
    EngineText => EngineName, "the name of a declared engine, or \"stub\"",
        |t| t.parse().map_err(|e: pool_domain::id::IdError| e.to_string());
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = |why: &str| format!("`{text}` {why}: write a number and a unit, such as \"500ms\", \"2s\" or \"10m\"");
    if text.trim_start().starts_with('-') {
        return Err(wrong("is negative"));
    }
    let value = humantime::parse_duration(text).map_err(|_| wrong("is no length of time"))?;
    if value > LONGEST { Err(wrong("is longer than a year")) } else { Ok(value) }
}

fn size(text: &str) -> Result<u64, String> {
    const MOST: u64 = 1 << 50;
    let wrong = |why: &str| format!("`{text}` {why}: write a number and a unit, such as \"24 GiB\" or \"800 MiB\"");
    if text.trim_start().starts_with('-') {
        return Err(wrong("is negative"));
    }
    if !text.starts_with(|c: char| c.is_ascii_digit()) || !text.ends_with(|c: char| c.is_ascii_alphabetic()) {
        return Err(wrong("is no size"));
    }
    let bytes = text.parse::<bytesize::ByteSize>().map_err(|_| wrong("is no size"))?.as_u64();
    match bytes {
        0 => Err(wrong("is nothing")),
        b if b > MOST => Err(wrong("is more than 1 PiB")),
        b => Ok(b),
    }
}

/// One mask for every replica (a string), or one per replica (a list).
#[derive(Debug, Clone, PartialEq)]
pub enum DevicesText {
    /// The same for all.
    One(MaskText),
    /// One each.
    PerReplica(Vec<MaskText>),
}

impl DevicesText {
    /// The masks in order.
    #[must_use]
    pub fn masks(&self) -> &[MaskText] {
        match self {
            Self::One(m) => std::slice::from_ref(m),
            Self::PerReplica(l) => l,
        }
    }
}

impl<'de> Deserialize<'de> for DevicesText {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = DevicesText;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}, or a list with one mask per replica", MaskText::EXPECTED)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<DevicesText, E> {
                MaskText::parse(text).map(DevicesText::One).map_err(E::custom)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<DevicesText, A::Error> {
                let mut list = Vec::new();
                while let Some(mask) = seq.next_element()? {
                    list.push(mask);
                }
                if list.is_empty() {
                    return Err(de::Error::custom("the list of device masks is empty: write one mask per replica"));
                }
                Ok(DevicesText::PerReplica(list))
            }
        }
        d.deserialize_any(V)
    }
}

impl Serialize for DevicesText {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::One(m) => m.serialize(s),
            Self::PerReplica(l) => l.serialize(s),
        }
    }
}

impl JsonSchema for DevicesText {
    fn schema_name() -> Cow<'static, str> {
        "DevicesText".into()
    }
    fn json_schema(g: &mut SchemaGenerator) -> Schema {
        let mask = g.subschema_for::<MaskText>();
        json_schema!({ "anyOf": [mask, { "type": "array", "items": mask, "minItems": 1 }] })
    }
}

/// How the weights lie on several devices.
#[derive(Debug, Clone, PartialEq)]
pub enum SplitText {
    /// As the engine does it by itself.
    Off,
    /// By free memory.
    Auto,
    /// By these ratios, as written.
    Ratios(String),
}

impl<'de> Deserialize<'de> for SplitText {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = SplitText;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"off\", \"auto\", or ratios such as \"3,1\" or [3, 1]")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<SplitText, E> {
                Ok(match text {
                    "off" => SplitText::Off,
                    "auto" => SplitText::Auto,
                    // Whether they are ratios is looked at when the pool is checked, with all that belongs to it.
                    ratios => SplitText::Ratios(ratios.to_owned()),
                })
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<SplitText, A::Error> {
                let mut ratios: Vec<String> = Vec::new();
                while let Some(ratio) = seq.next_element::<RatioText>()? {
                    ratios.push(ratio.0);
                }
                Ok(SplitText::Ratios(ratios.join(",")))
            }
        }
        d.deserialize_any(V)
    }
}

/// One ratio: a number, or whatever stands there in its place, which the check of the pool names.
struct RatioText(String);

impl<'de> Deserialize<'de> for RatioText {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = RatioText;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a ratio")
            }
            fn visit_i64<E: de::Error>(self, n: i64) -> Result<RatioText, E> {
                Ok(RatioText(n.to_string()))
            }
            fn visit_u64<E: de::Error>(self, n: u64) -> Result<RatioText, E> {
                Ok(RatioText(n.to_string()))
            }
            fn visit_f64<E: de::Error>(self, n: f64) -> Result<RatioText, E> {
                Ok(RatioText(n.to_string()))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<RatioText, E> {
                Ok(RatioText(text.to_owned()))
            }
        }
        d.deserialize_any(V)
    }
}

impl Serialize for SplitText {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => s.serialize_str("off"),
            Self::Auto => s.serialize_str("auto"),
            Self::Ratios(r) => s.serialize_str(r),
        }
    }
}

impl JsonSchema for SplitText {
    fn schema_name() -> Cow<'static, str> {
        "SplitText".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [
            { "enum": ["off", "auto"] }, { "type": "string" }, { "type": "array", "items": { "type": "number" } }
        ] })
    }
}
