//! Pools as they are declared and changed over the wire: whole, or as a patch of what they are.

use pool_domain::PoolId;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::plan::spec_problem;
use super::problem::{Code, Problem};
use crate::spec::{Defaults, DevicesText, EngineText, ModelText, OnDeadlineText, PoolSpec, StrategyText};

/// The keys of a JSON object.
pub type Keys = Map<String, Value>;

/// Body of `reload`: any key of the pool stands in for the one it has (null takes it away, tables are merged), and how
/// to get there.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct ReloadBody {
    /// The same as `model`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_model_ref: Option<String>,
    /// The same as `version`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_engine_version: Option<String>,
    /// Time for the whole of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// What happens then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_deadline: Option<OnDeadlineText>,
    /// How engines are replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<StrategyText>,
    /// Any key of the pool.
    #[serde(flatten)]
    #[cfg_attr(feature = "server", schema(value_type = Object))]
    pub keys: Keys,
}

impl ReloadBody {
    /// The keys of the pool that it changes.
    ///
    /// # Errors
    /// When one is given under both of its names.
    #[expect(clippy::result_large_err, reason = "an error that becomes an answer at once")]
    pub fn changes(&mut self) -> Result<Keys, Problem> {
        let mut keys = std::mem::take(&mut self.keys);
        for (given, name, key) in [
            (self.new_model_ref.take(), "new_model_ref", "model"),
            (self.new_engine_version.take(), "new_engine_version", "version"),
        ] {
            let Some(value) = given else { continue };
            if keys.insert(key.into(), value.into()).is_some() {
                return Err(Problem::new(Code::InvalidParams, format!("`{name}` and `{key}` are the same: give one")));
            }
        }
        Ok(keys)
    }
}

/// A pool's keys with others over them, as RFC 7386 says.
pub fn merge(into: &mut Keys, patch: Keys) {
    for (key, value) in patch {
        match (into.get_mut(&key), value) {
            (_, Value::Null) => {
                into.remove(&key);
            }
            (Some(Value::Object(table)), Value::Object(patch)) => merge(table, patch),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// What makes `new` of `old` by [`merge`].
#[must_use]
pub fn patch(old: &Keys, new: &Keys) -> Keys {
    let gone = old.keys().filter(|k| !new.contains_key(*k)).map(|k| (k.clone(), Value::Null));
    let changed = new.iter().filter(|(k, v)| old.get(*k) != Some(v)).map(|(k, v)| match (old.get(k), v) {
        (Some(Value::Object(old)), Value::Object(new)) => (k.clone(), patch(old, new).into()),
        _ => (k.clone(), v.clone()),
    });
    gone.chain(changed).collect()
}

/// The keys of a document.
///
/// # Errors
/// When it is none.
pub fn keys(document: &str) -> Result<Keys, serde_json::Error> {
    serde_json::from_str(document)
}

/// Whose user engines run as is for the config file to say: whoever reaches the API neither chooses one nor takes one away.
///
/// # Errors
/// When the two keys differ in it.
#[expect(clippy::result_large_err, reason = "an error that becomes an answer at once")]
pub fn same_user(old: Option<&Keys>, new: &Keys) -> Result<(), Problem> {
    let user =
        |keys: &'_ Keys| keys.get("isolation").and_then(|table| table.get("run_as")).cloned().filter(|v| !v.is_null());
    if old.and_then(user) == user(new) {
        return Ok(());
    }
    Err(Problem::new(Code::ArgDenied, "`isolation.run_as` is not for the API to set")
        .with_hint("write it in the pool's table of the config file"))
}

/// A pool that is declared by its keys, checked as one of the config file is, and the document that says the same.
///
/// # Errors
/// With the code of the key that cannot be.
#[expect(clippy::result_large_err, reason = "an error that becomes an answer at once")]
pub fn declared(
    id: &PoolId,
    mut keys: Keys,
    defaults: &Defaults,
) -> Result<(pool_services::PoolSpec, String), Problem> {
    if keys.get("id").is_some_and(|given| given.as_str() != Some(id.as_str())) {
        return Err(Problem::new(Code::InvalidParams, "`id` in the body is not the one in the path"));
    }
    keys.insert("id".into(), id.as_str().into());
    // These have codes of their own.
    well_formed::<ModelText>(&keys, "model", Code::ModelRefInvalid)?;
    well_formed::<DevicesText>(&keys, "devices", Code::MaskInvalid)?;
    well_formed::<EngineText>(&keys, "engine", Code::EngineUnknown)?;
    let unfit = |e: serde_json::Error| Problem::new(Code::InvalidParams, format!("the body does not fit: {e}"));
    let spec: PoolSpec = serde_json::from_value(keys.into()).map_err(unfit)?;
    let document = serde_json::to_string(&spec).map_err(unfit)?;
    Ok((spec.check(defaults).map_err(|e| spec_problem(&e))?, document))
}

#[expect(clippy::result_large_err, reason = "an error that becomes an answer at once")]
fn well_formed<'a, T: Deserialize<'a>>(keys: &'a Keys, key: &str, code: Code) -> Result<(), Problem> {
    match keys.get(key).filter(|v| !v.is_null()).map(T::deserialize) {
        Some(Err(e)) => Err(Problem::new(code, format!("{key}: {e}"))),
        _ => Ok(()),
    }
}

/// A pool as it is declared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct SpecView {
    /// Revision of the spec: its ETag.
    pub revision: u64,
    /// `file` or `api`.
    pub source: String,
    /// The `[[pool]]` table.
    #[cfg_attr(feature = "server", schema(value_type = Object))]
    pub pool: Value,
}

/// What became of one pool of a config that was read again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct PoolChangeView {
    /// The pool.
    pub pool_id: String,
    /// `new`, `changed` or `gone`.
    pub change: String,
    /// The operation that carries it out, where it was begun.
    pub operation_id: Option<String>,
    /// Why it was not.
    pub problem: Option<String>,
}

/// What became of a config that was read again.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct ConfigReloadView {
    /// Pools that are not as they were.
    pub pools: Vec<PoolChangeView>,
    /// Pools that are as they were, and were not touched.
    pub unchanged: Vec<String>,
    /// Keys outside `[[pool]]` that are not as they were: they count after a restart.
    pub needs_restart: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(text: &str) -> Keys {
        keys(text).unwrap()
    }

    #[test]
    fn a_user_is_neither_chosen_nor_changed_nor_taken_away() {
        let with = object(r#"{"isolation":{"run_as":"a","nofile":9}}"#);
        for other in
            ["{}", r#"{"isolation":null}"#, r#"{"isolation":{"run_as":null}}"#, r#"{"isolation":{"run_as":"b"}}"#]
        {
            assert!(same_user(Some(&with), &object(other)).is_err(), "{other}");
            assert_eq!(same_user(None, &object(other)).is_ok(), !other.contains("\"b\""), "{other}");
        }
        assert!(same_user(Some(&with), &object(r#"{"isolation":{"run_as":"a"}}"#)).is_ok());
    }

    #[test]
    fn a_patch_makes_the_one_of_the_other() {
        let cases = [
            (r#"{"a":1,"t":{"x":1,"y":2}}"#, r#"{"a":2,"t":{"x":1,"z":3}}"#, r#"{"a":2,"t":{"y":null,"z":3}}"#),
            (r#"{"a":1}"#, r#"{"t":{"x":1}}"#, r#"{"a":null,"t":{"x":1}}"#),
            (r#"{"a":[1,2]}"#, r#"{"a":[1]}"#, r#"{"a":[1]}"#),
            (r#"{"t":{"x":1}}"#, r#"{"t":"off"}"#, r#"{"t":"off"}"#),
            (r#"{"a":1}"#, r#"{"a":1}"#, "{}"),
        ];
        for (old, new, expected) in cases {
            let (mut old, new) = (object(old), object(new));
            let change = patch(&old, &new);
            assert_eq!(change, object(expected));
            merge(&mut old, change);
            assert_eq!(old, new);
        }
    }

    #[test]
    fn a_key_is_given_under_one_of_its_names() {
        let mut body: ReloadBody =
            serde_json::from_str(r#"{"new_model_ref":"stub:b","slots":2,"strategy":"overlap"}"#).unwrap();
        assert_eq!(body.changes().unwrap(), object(r#"{"model":"stub:b","slots":2}"#));
        let mut body: ReloadBody = serde_json::from_str(r#"{"new_model_ref":"stub:b","model":"stub:c"}"#).unwrap();
        assert_eq!(body.changes().unwrap_err().code, "INVALID_PARAMS");
    }
}
