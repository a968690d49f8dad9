//! Charts as SVG: axes with units, marks, a legend; coordinates have one decimal. Paper, lines and text are dark on light,
//! and light on dark where the reader's system is dark and the program that draws knows of that; marks have colours that
//! stand out from both.

use std::fmt::Write as _;

/// Width of a picture; all lengths here are pixels.
const WIDTH: f64 = 960.0;
/// Room left of the plots for the labels of the vertical axis.
const LEFT: f64 = 76.0;
/// Room right of the plots for the names of bands.
const RIGHT: f64 = 104.0;
/// Room above the first plot for title and legend.
const TOP: f64 = 68.0;
/// Room below each plot for the labels of the horizontal axis, and the next plot's beginning.
const BOTTOM: f64 = 54.0;

/// The colours of a dark system, in place of those that elements have themselves.
const DARK: &str = "@media (prefers-color-scheme:dark){.paper{fill:#0d1117}.text{fill:#d1d7e0}.axis{stroke:#d1d7e0}\
                    .edge{stroke:#656c76}.grid{stroke:#2a3038}}";

const TEXT: &str = r##"class="text" fill="#333333""##;
const AXIS: &str = r##"class="axis" stroke="#333333""##;
const EDGE: &str = r##"class="edge" stroke="#b0b0b0""##;
const GRID: &str = r##"class="grid" stroke="#e4e4e4""##;

/// Width of a character of the small labels; about half its height.
const LABEL_CHARACTER: f64 = 6.0;

/// A picture: plots one below the other.
pub(crate) struct Picture {
    body: String,
    height: f64,
    legend_x: f64,
}

/// One plot of a picture: where it is, and the range from 0 that it shows.
pub(crate) struct Plot {
    top: f64,
    height: f64,
    x_max: f64,
    y_max: f64,
}

/// How marks are drawn.
#[derive(Clone, Copy)]
pub(crate) struct Ink<'a> {
    pub(crate) color: &'a str,
    /// From 0 to 1.
    pub(crate) opacity: f64,
    /// The narrowest and the lowest that a mark may be, in pixels.
    pub(crate) least: (f64, f64),
}

/// An axis from 0 to `max`.
pub(crate) struct Axis<'a> {
    pub(crate) max: f64,
    /// What is shown, and its unit.
    pub(crate) label: &'a str,
}

impl Picture {
    /// A picture without plots.
    pub(crate) fn new(title: &str) -> Self {
        let mut picture = Self { body: String::new(), height: TOP, legend_x: LEFT };
        picture.text((LEFT, 22.0), "start", 15, title);
        picture
    }

    /// Adds an entry to the legend.
    pub(crate) fn legend(&mut self, color: &str, text: &str) {
        let x = self.legend_x;
        let _ = writeln!(self.body, r#"<rect x="{x:.1}" y="34" width="10" height="10" fill="{color}"/>"#);
        self.text((x + 14.0, 43.0), "start", 12, text);
        // A character is about as wide as half its height.
        self.legend_x += 34.0 + 6.4 * f64::from(u16::try_from(text.chars().count()).unwrap_or(u16::MAX));
    }

    /// Adds a plot of this height below the others.
    pub(crate) fn plot(&mut self, height: f64, x: &Axis<'_>, y: &Axis<'_>) -> Plot {
        let plot = Plot { top: self.height, height, x_max: positive(x.max), y_max: positive(y.max) };
        self.height += height + BOTTOM;
        let (right, bottom) = (WIDTH - RIGHT, plot.top + height);
        for value in ticks(plot.x_max) {
            let at = plot.x(value);
            self.line((at, plot.top), (at, bottom), GRID);
            self.text((at, bottom + 16.0), "middle", 11, &tick_text(value));
        }
        for value in ticks(plot.y_max) {
            let at = plot.y(value);
            self.line((LEFT, at), (right, at), GRID);
            self.text((LEFT - 6.0, at + 4.0), "end", 11, &tick_text(value));
        }
        self.line((LEFT, bottom), (right, bottom), AXIS);
        self.line((LEFT, plot.top), (LEFT, bottom), AXIS);
        self.text((f64::midpoint(LEFT, right), bottom + 32.0), "middle", 12, x.label);
        let (at, label) = (plot.top + height / 2.0, escape(y.label));
        let _ = writeln!(
            self.body,
            r#"<text x="18" y="{at:.1}" font-size="12" {TEXT} text-anchor="middle" transform="rotate(-90 18 {at:.1})">{label}</text>"#
        );
        plot
    }

    /// Draws bars from `(x, y)` to `(x, y)`. Bars that look the same are drawn once, so a picture has a bounded size.
    pub(crate) fn bars(&mut self, plot: &Plot, ink: &Ink<'_>, bars: impl Iterator<Item = ((f64, f64), (f64, f64))>) {
        let mut path = String::new();
        let mut last = [0; 4];
        for ((x0, y0), (x1, y1)) in bars {
            let (left, bottom) = (plot.x(x0), plot.y(y0));
            let width = (plot.x(x1) - left).max(ink.least.0);
            let height = (bottom - plot.y(y1)).max(ink.least.1);
            #[expect(clippy::cast_possible_truncation, reason = "pixels of a picture, halves of them")]
            let looks = [left, bottom, width, height].map(|value| (value * 2.0).round() as i32);
            if looks != last {
                let [left, bottom, width, height] = looks.map(|value| f64::from(value) / 2.0);
                let _ = write!(path, "M{left} {bottom}h{width}v-{height}h-{width}z");
                last = looks;
            }
        }
        if !path.is_empty() {
            let Ink { color, opacity, .. } = ink;
            let opacity = if *opacity < 1.0 { format!(r#" fill-opacity="{opacity}""#) } else { String::new() };
            let _ = writeln!(self.body, r#"<path fill="{color}"{opacity} d="{path}"/>"#);
        }
    }

    /// Draws steps through these points, from left to right.
    pub(crate) fn steps(&mut self, plot: &Plot, color: &str, points: impl Iterator<Item = (f64, f64)>) {
        let mut path = String::new();
        let mut last = (f64::NAN, f64::NAN);
        for (x, y) in points {
            let at = (plot.x(x).round(), plot.y(y).round());
            if path.is_empty() {
                let _ = write!(path, "M{} {}", at.0, at.1);
            } else if at != last {
                let _ = write!(path, "H{}V{}", at.0, at.1);
            }
            last = at;
        }
        let _ = writeln!(self.body, r#"<path fill="none" stroke="{color}" stroke-width="1.5" d="{path}"/>"#);
    }

    /// Marks moments, the earliest first, with a vertical line each and their names above. Names that would lie on each
    /// other become one.
    pub(crate) fn moments<'a>(&mut self, plot: &Plot, moments: impl Iterator<Item = (f64, &'a str)>) {
        let (top, bottom) = (plot.top, plot.top + plot.height);
        let mut labels: Vec<(f64, String)> = Vec::new();
        for (x, name) in moments {
            let at = plot.x(x);
            let _ = writeln!(
                self.body,
                r#"<path {AXIS} stroke-dasharray="4 3" fill="none" d="M{at:.1} {top:.1}V{bottom:.1}"/>"#
            );
            match labels.last_mut() {
                Some((before, names)) if at < *before + width_of(names) => {
                    names.push_str(", ");
                    names.push_str(name);
                }
                _ => labels.push((at, name.to_owned())),
            }
        }
        for (at, names) in labels {
            let is_last = at + width_of(&names) > WIDTH - RIGHT;
            let (anchor, shift) = if is_last { ("end", 4.0) } else { ("start", -4.0) };
            self.text((at + shift, top - 4.0), anchor, 11, &names);
        }
    }

    /// Marks the part of the vertical axis from `from` to `to` with a line below it and its name on the right.
    pub(crate) fn band(&mut self, plot: &Plot, from: f64, to: f64, name: &str) {
        let right = WIDTH - RIGHT;
        let (bottom, top) = (plot.y(from), plot.y(to));
        self.line((LEFT, bottom), (right + 6.0, bottom), EDGE);
        if bottom - top >= 11.0 {
            self.text((right + 6.0, f64::midpoint(bottom, top) + 4.0), "start", 11, name);
        }
    }

    /// The picture as a file.
    pub(crate) fn finish(self) -> String {
        let Self { body, height, .. } = self;
        format!(
            concat!(
                r#"<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" "#,
                r#"font-family="DejaVu Sans, Helvetica, sans-serif">"#,
                "\n",
                "<style>{dark}</style>\n",
                r##"<rect width="{w}" height="{h}" class="paper" fill="#ffffff"/>"##,
                "\n{b}</svg>\n"
            ),
            dark = DARK,
            w = WIDTH,
            h = height,
            b = body
        )
    }

    fn line(&mut self, (x0, y0): (f64, f64), (x1, y1): (f64, f64), stroke: &str) {
        let _ = writeln!(self.body, r#"<path {stroke} d="M{x0:.1} {y0:.1}L{x1:.1} {y1:.1}"/>"#);
    }

    fn text(&mut self, (x, y): (f64, f64), anchor: &str, size: u8, text: &str) {
        let text = escape(text);
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" font-size="{size}" {TEXT} text-anchor="{anchor}">{text}</text>"#
        );
    }
}

impl Plot {
    fn x(&self, value: f64) -> f64 {
        LEFT + (value / self.x_max).clamp(0.0, 1.0) * (WIDTH - RIGHT - LEFT)
    }

    fn y(&self, value: f64) -> f64 {
        self.top + (1.0 - (value / self.y_max).clamp(0.0, 1.0)) * self.height
    }
}

fn positive(max: f64) -> f64 {
    if max.is_finite() && max > 0.0 { max } else { 1.0 }
}

/// How much room the name of a moment takes.
fn width_of(label: &str) -> f64 {
    (8.0 + LABEL_CHARACTER * f64::from(u16::try_from(label.chars().count()).unwrap_or(u16::MAX))).min(WIDTH)
}

/// Round values from 0 to `max`, some 4 to 10 of them.
fn ticks(max: f64) -> impl Iterator<Item = f64> {
    let magnitude = 10f64.powf((max / 5.0).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * magnitude);
    let step = steps.into_iter().find(|step| max / step <= 8.0).unwrap_or(steps[3]);
    (0u32..).map(move |number| f64::from(number) * step).take_while(move |value| *value <= max * 1.000_001)
}

/// A number as short as it is exact enough for a tick.
fn tick_text(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// The text for XML and HTML; characters that XML cannot hold are left out.
pub(crate) fn escape(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).fold(String::new(), |mut escaped, character| {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
        escaped
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        for max in [0.003, 0.07, 1.0, 2.2, 9.9, 37.0, 420.0, 9173.0, 1e9] {
            let all: Vec<f64> = ticks(max).collect();
            assert!((4..=9).contains(&all.len()), "{max}: {all:?}");
        }
        assert_eq!(ticks(2.2).map(tick_text).collect::<Vec<_>>(), ["0", "0.5", "1", "1.5", "2"]);
    }

    #[test]
    fn names_that_would_lie_on_each_other_become_one() {
        let mut picture = Picture::new("");
        let axis = || Axis { max: 100.0, label: "" };
        let plot = picture.plot(100.0, &axis(), &axis());
        picture.moments(&plot, [(0.0, "one"), (0.1, "two"), (50.0, "half"), (100.0, "last")].into_iter());
        let text = picture.finish();
        assert!(
            [">one, two<", ">half<", r#"text-anchor="end">last<"#].iter().all(|label| text.contains(label)),
            "{text}"
        );
    }

    #[test]
    fn names_cannot_break_the_file() {
        let mut picture = Picture::new("a <b> & \"c\"\u{7}");
        let axis = |label| Axis { max: f64::NAN, label };
        let plot = picture.plot(100.0, &axis("x"), &axis("y"));
        let ink = Ink { color: "#000000", opacity: 1.0, least: (1.0, 1.0) };
        picture.bars(&plot, &ink, [((0.0, f64::INFINITY), (f64::NAN, 0.0))].into_iter());
        let text = picture.finish();
        assert!(text.contains("a &lt;b&gt; &amp; &quot;c&quot;<"), "{text}");
    }
}
