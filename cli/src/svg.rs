//! Charts as SVG: axes with units, marks, a legend. Plain text without a style sheet; coordinates have one decimal.

use std::fmt::Write as _;

/// Width of a picture; all lengths here are pixels.
const WIDTH: f64 = 960.0;
/// Room left of the plots for the labels of the vertical axis.
const LEFT: f64 = 76.0;
/// Room right of the plots for the names of bands.
const RIGHT: f64 = 104.0;
/// Room above the first plot for title and legend.
const TOP: f64 = 60.0;
/// Room below each plot for the labels of the horizontal axis, and the next plot's beginning.
const BOTTOM: f64 = 54.0;

const TEXT: &str = "#333333";
const GRID: &str = "#e4e4e4";

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
        self.line((LEFT, bottom), (right, bottom), TEXT);
        self.line((LEFT, plot.top), (LEFT, bottom), TEXT);
        self.text((f64::midpoint(LEFT, right), bottom + 32.0), "middle", 12, x.label);
        let (at, label) = (plot.top + height / 2.0, escape(y.label));
        let _ = writeln!(
            self.body,
            r#"<text x="18" y="{at:.1}" font-size="12" fill="{TEXT}" text-anchor="middle" transform="rotate(-90 18 {at:.1})">{label}</text>"#
        );
        plot
    }

    /// Draws bars of one colour from `(x, y)` to `(x, y)`, at least a pixel wide and `thinnest` pixels high. Bars that
    /// look the same are drawn once, so a picture has a bounded size.
    pub(crate) fn bars(
        &mut self,
        plot: &Plot,
        color: &str,
        thinnest: f64,
        bars: impl Iterator<Item = ((f64, f64), (f64, f64))>,
    ) {
        let mut path = String::new();
        let mut last = [0; 4];
        for ((x0, y0), (x1, y1)) in bars {
            let (left, bottom) = (plot.x(x0), plot.y(y0));
            let width = (plot.x(x1) - left).max(1.0);
            let height = (bottom - plot.y(y1)).max(thinnest);
            #[expect(clippy::cast_possible_truncation, reason = "pixels of a picture, halves of them")]
            let looks = [left, bottom, width, height].map(|value| (value * 2.0).round() as i32);
            if looks != last {
                let [left, bottom, width, height] = looks.map(|value| f64::from(value) / 2.0);
                let _ = write!(path, "M{left} {bottom}h{width}v-{height}h-{width}z");
                last = looks;
            }
        }
        if !path.is_empty() {
            let _ = writeln!(self.body, r#"<path fill="{color}" d="{path}"/>"#);
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

    /// Marks a moment with a vertical line and its name.
    pub(crate) fn moment(&mut self, plot: &Plot, x: f64, name: &str) {
        let at = plot.x(x);
        let (top, bottom) = (plot.top, plot.top + plot.height);
        let _ = writeln!(
            self.body,
            r#"<path stroke="{TEXT}" stroke-dasharray="4 3" fill="none" d="M{at:.1} {top:.1}V{bottom:.1}"/>"#
        );
        let (anchor, shift) = if at > WIDTH - RIGHT - 60.0 { ("end", 4.0) } else { ("start", -4.0) };
        self.text((at + shift, top - 4.0), anchor, 11, name);
    }

    /// Marks the part of the vertical axis from `from` to `to` with a line below it and its name on the right.
    pub(crate) fn band(&mut self, plot: &Plot, from: f64, to: f64, name: &str) {
        let right = WIDTH - RIGHT;
        let (bottom, top) = (plot.y(from), plot.y(to));
        self.line((LEFT, bottom), (right + 6.0, bottom), "#b0b0b0");
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
                r##"<rect width="{w}" height="{h}" fill="#ffffff"/>"##,
                "\n{b}</svg>\n"
            ),
            w = WIDTH,
            h = height,
            b = body
        )
    }

    fn line(&mut self, (x0, y0): (f64, f64), (x1, y1): (f64, f64), color: &str) {
        let _ = writeln!(self.body, r#"<path stroke="{color}" d="M{x0:.1} {y0:.1}L{x1:.1} {y1:.1}"/>"#);
    }

    fn text(&mut self, (x, y): (f64, f64), anchor: &str, size: u8, text: &str) {
        let text = escape(text);
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" font-size="{size}" fill="{TEXT}" text-anchor="{anchor}">{text}</text>"#
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

/// The text for XML; characters that XML cannot hold are left out.
fn escape(text: &str) -> String {
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
    fn names_cannot_break_the_file() {
        let mut picture = Picture::new("a <b> & \"c\"\u{7}");
        let axis = |label| Axis { max: f64::NAN, label };
        let plot = picture.plot(100.0, &axis("x"), &axis("y"));
        picture.bars(&plot, "#000000", 1.0, [((0.0, f64::INFINITY), (f64::NAN, 0.0))].into_iter());
        let text = picture.finish();
        assert!(text.contains("a &lt;b&gt; &amp; &quot;c&quot;<"), "{text}");
    }
}
