//! Every key of a configuration, asked of the types themselves.
//!
//! Serde tells a deserializer which fields a struct has. This one listens and gives nothing back, so
//! keys whose default is "none", which no written default shows, are found as well.

use std::cell::Cell;

use serde::{
    Deserialize,
    de::{
        DeserializeSeed, Deserializer, Error, IntoDeserializer, MapAccess, Visitor,
        value::Error as Nothing,
    },
    forward_to_deserialize_any,
};

/// A key with the sections that it lies in, outermost first.
pub(super) type Path = Vec<&'static str>;

/// Every key of `T` that is not a section, in the order of the fields.
pub(super) fn keys_of<T: for<'de> Deserialize<'de>>() -> Vec<Path> {
    let mut keys = Vec::new();
    let mut unvisited = vec![Path::new()];
    while let Some(path) = unvisited.pop() {
        let found = Cell::new(None);
        // It always fails; what counts is what was found on the way.
        drop(T::deserialize(Probe {
            path: &path,
            found: &found,
        }));
        match found.get() {
            Some(fields) => unvisited.extend(
                fields
                    .iter()
                    .rev()
                    .map(|field| [&path[..], &[*field]].concat()),
            ),
            None => keys.push(path),
        }
    }
    keys
}

/// Walks down `path` and notes the fields of the struct at its end, if there is one.
#[derive(Clone, Copy)]
struct Probe<'a> {
    path: &'a [&'static str],
    found: &'a Cell<Option<&'static [&'static str]>>,
}

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = Nothing;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Nothing> {
        let Some((key, rest)) = self.path.split_first() else {
            self.found.set(Some(fields));
            return Err(Nothing::custom("found"));
        };
        visitor.visit_map(OneKey {
            key: Some(key),
            value: Probe { path: rest, ..self },
        })
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Nothing> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Nothing> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Nothing> {
        Err(Nothing::custom("not a section"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// A map with one key, whose value goes on probing.
struct OneKey<'a> {
    key: Option<&'static str>,
    value: Probe<'a>,
}

impl<'de> MapAccess<'de> for OneKey<'_> {
    type Error = Nothing;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Nothing> {
        self.key
            .take()
            .map(|key| seed.deserialize(key.into_deserializer()))
            .transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Nothing> {
        seed.deserialize(self.value)
    }
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, time::Duration};

    use super::*;

    #[derive(Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Outer {
        number: u64,
        none: Option<PathBuf>,
        inner: Inner,
        list: Vec<String>,
    }

    #[derive(Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Inner {
        #[serde(with = "humantime_serde")]
        time: Duration,
        #[serde(with = "humantime_serde")]
        no_time: Option<Duration>,
    }

    #[test]
    fn all_keys_are_found_in_order() {
        let keys: Vec<String> = keys_of::<Outer>()
            .iter()
            .map(|path| path.join("."))
            .collect();
        assert_eq!(
            keys,
            ["number", "none", "inner.time", "inner.no_time", "list"]
        );
    }
}
