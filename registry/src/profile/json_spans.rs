//! Where the elements of an array lie in a JSON text, so that one can be changed without touching a byte of the others.
//!
//! For text that a JSON parser has accepted; of other text it may find nonsense, but it stays within its bounds and ends.

use std::ops::Range;

/// An array in a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ArraySpans {
    /// Just behind the opening bracket.
    pub(super) start: usize,
    /// Each element without the white space around it.
    pub(super) elements: Vec<Range<usize>>,
}

/// Finds the array that is the value of `key` in the object that `text` is. The key must be written without escapes.
pub(super) fn array_in_object(text: &[u8], key: &str) -> Option<ArraySpans> {
    let mut scanner = Scanner { text, at: 0 };
    scanner.expect(b'{')?;
    loop {
        let name = scanner.value()?;
        scanner.expect(b':')?;
        if text.get(name.start + 1..name.end.checked_sub(1)?)? == key.as_bytes() {
            return scanner.array();
        }
        scanner.value()?;
        scanner.expect(b',')?;
    }
}

struct Scanner<'a> {
    text: &'a [u8],
    at: usize,
}

impl Scanner<'_> {
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at).is_some_and(|byte| b" \t\r\n".contains(byte)) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.at += 1)
    }

    fn array(&mut self) -> Option<ArraySpans> {
        self.expect(b'[')?;
        let mut spans = ArraySpans { start: self.at, elements: Vec::new() };
        if self.peek()? == b']' {
            return Some(spans);
        }
        loop {
            spans.elements.push(self.value()?);
            match self.peek()? {
                b',' => self.at += 1,
                b']' => return Some(spans),
                _ => return None,
            }
        }
    }

    /// Passes one value of any kind.
    fn value(&mut self) -> Option<Range<usize>> {
        let first = self.peek()?;
        let start = self.at;
        match first {
            b'"' => self.string()?,
            b'{' | b'[' => self.nested()?,
            _ => {
                while self.text.get(self.at).is_some_and(|byte| !b" \t\r\n,:]}".contains(byte)) {
                    self.at += 1;
                }
            }
        }
        (self.at > start).then_some(start..self.at)
    }

    fn nested(&mut self) -> Option<()> {
        let mut depth = 0_usize;
        loop {
            match *self.text.get(self.at)? {
                b'"' => {
                    self.string()?;
                    continue;
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth -= 1,
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                return Some(());
            }
        }
    }

    fn string(&mut self) -> Option<()> {
        self.at += 1;
        loop {
            match *self.text.get(self.at)? {
                b'"' => break,
                b'\\' => self.at += 2,
                _ => self.at += 1,
            }
        }
        self.at += 1;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements(text: &str) -> Option<Vec<&str>> {
        let spans = array_in_object(text.as_bytes(), "a")?;
        Some(spans.elements.into_iter().map(|span| &text[span]).collect())
    }

    #[test]
    fn elements_are_found_whatever_is_around_them() {
        assert_eq!(elements(r#"{"a":[]}"#), Some(vec![]));
        assert_eq!(elements("{ \"a\" :\n[ ] }"), Some(vec![]));
        let text =
            r#"{"x":{"a":[9]},"y":"\"a\":[8]","z":-1.5e3,"a": [ {"b":"]}\\"} ,[1,[2]],"s\"",null , 12 ],"a2":[]}"#;
        assert_eq!(elements(text), Some(vec![r#"{"b":"]}\\"}"#, "[1,[2]]", r#""s\"""#, "null", "12"]));
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        for text in ["", "{}", "[]", r#"{"b":[1]}"#, r#"{"a":{}}"#, r#"{"a":1}"#, r#"{"a":[1"#, r#"{"a":[""#, "{\"\\"] {
            assert_eq!(elements(text), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_passed(text in r#"[{}\[\]"a\\,: 1]{0,60}"#) {
            let _ = array_in_object(text.as_bytes(), "a");
        }

        #[test]
        fn agrees_with_a_parser(values in proptest::collection::vec(".{0,8}", 0..6), pretty in proptest::bool::ANY) {
            let value = serde_json::json!({"0": values, "a": values, "z": 1});
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }.unwrap();
            let found: Vec<String> =
                elements(&text).unwrap().into_iter().map(|element| serde_json::from_str(element).unwrap()).collect();
            proptest::prop_assert_eq!(found, values);
        }
    }
}
