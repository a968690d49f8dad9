//! An HTML page that needs nothing else: no script, font or picture from outside, so it can be mailed and kept.

use std::fmt::Write as _;

use crate::svg::escape;

/// Readable on light and dark systems.
const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color-scheme:light dark}\
    table{border-collapse:collapse}td,th{padding:.15em 1em .15em 0;text-align:left;vertical-align:top;font-weight:400}\
    th{opacity:.7}.number{text-align:right;font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}h2{margin-top:2em}\
    .bar{width:20em}.bar div{background:#3b82c9;height:1em}code{font-size:.95em}";

/// A page as far as it is written. All text is escaped but that of [`Page::picture`].
pub(crate) struct Page(String);

impl Page {
    pub(crate) fn new(title: &str) -> Self {
        let title = escape(title);
        Self(format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
             <title>{title}</title>\n<style>{STYLE}</style>\n<h1>{title}</h1>\n"
        ))
    }

    pub(crate) fn heading(&mut self, text: &str) {
        let _ = writeln!(self.0, "<h2>{}</h2>", escape(text));
    }

    pub(crate) fn paragraph(&mut self, text: &str) {
        let _ = writeln!(self.0, "<p>{}</p>", escape(text));
    }

    /// An SVG of ours.
    pub(crate) fn picture(&mut self, svg: &str) {
        self.0.push_str(svg);
    }

    /// Rows of a label and a value.
    pub(crate) fn figures(&mut self, rows: &[(&str, String)]) {
        self.0.push_str("<table>\n");
        for (label, value) in rows {
            let _ = writeln!(self.0, "<tr><th>{}<td>{}", escape(label), escape(value));
        }
        self.0.push_str("</table>\n");
    }

    /// Rows of a label and numbers, below a header.
    pub(crate) fn numbers(&mut self, header: &[&str], rows: &[(&str, Vec<String>)]) {
        self.0.push_str("<table>\n<tr>");
        for (column, name) in header.iter().enumerate() {
            let _ = write!(self.0, "<th{}>{}", if column > 0 { " class=\"number\"" } else { "" }, escape(name));
        }
        for (label, numbers) in rows {
            let _ = write!(self.0, "\n<tr><th>{}", escape(label));
            for number in numbers {
                let _ = write!(self.0, "<td class=\"number\">{}", escape(number));
            }
        }
        self.0.push_str("\n</table>\n");
    }

    /// Bars beside each other: a label, its part of the longest, and the value as text.
    pub(crate) fn bars(&mut self, bars: &[(&str, f64, String)]) {
        self.0.push_str("<table>\n");
        for (label, part, value) in bars {
            let width = (part.clamp(0.0, 1.0) * 100.0).max(0.5);
            let (label, value) = (escape(label), escape(value));
            let _ = writeln!(
                self.0,
                "<tr><th>{label}<td class=\"bar\"><div style=\"width:{width:.1}%\"></div><td class=\"number\">{value}"
            );
        }
        self.0.push_str("</table>\n");
    }

    pub(crate) fn finish(mut self) -> String {
        self.0.push_str("</html>\n");
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_the_page() {
        let mut page = Page::new("r/<x>");
        page.heading("<script>");
        page.paragraph("<script>");
        page.figures(&[("<script>", "<script>".to_owned())]);
        page.numbers(&["<script>"], &[("<script>", vec!["<script>".to_owned()])]);
        page.bars(&[("<script>", 2.0, "<script>".to_owned())]);
        let page = page.finish();
        assert!(page.contains("<title>r/&lt;x&gt;</title>") && !page.contains("<script>"), "{page}");
        assert!(page.contains("width:100.0%"), "{page}");
    }
}
