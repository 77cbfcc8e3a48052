//! The picture: slow-downs against native, as bars on a logarithmic scale.

use std::fmt::Display;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};
use xtask::{Error, at, packages, run};

use super::launch::Launcher;
use super::report::About;
use super::results::Results;

/// Fonts by style, from Debian's package of that name.
const FONTS: &[(FontStyle, &str)] = &[
    (FontStyle::Normal, "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf"),
    (FontStyle::Bold, "/usr/share/fonts/truetype/dejavu/DejaVuSans-Bold.ttf"),
];
const FONT_PACKAGE: &str = "fonts-dejavu-core";
/// The family, and what stands in for it where an SVG is shown.
const FAMILY: &str = "DejaVu Sans, Verdana, sans-serif";

/// Colours of the launchers.
const COLOURS: &[(Launcher, RGBColor)] = &[
    (Launcher::Tcg, RGBColor(0xe0, 0x8a, 0x2c)),
    (Launcher::TcgTuned, RGBColor(0xc9, 0xb0, 0x37)),
    (Launcher::Ring3, RGBColor(0x1f, 0x6f, 0xb4)),
    (Launcher::Kvm, RGBColor(0x5b, 0x9e, 0x5f)),
];
const INK: RGBColor = RGBColor(0x22, 0x26, 0x2b);
const FAINT: RGBColor = RGBColor(0x60, 0x66, 0x6d);
const GRID: RGBColor = RGBColor(0xdd, 0xe0, 0xe4);
const BAND: RGBColor = RGBColor(0xf5, 0xf6, 0xf8);

// Sizes and colours of text.
const TITLE: (i32, RGBColor) = (22, INK);
const NAME: (i32, RGBColor) = (14, INK);
const ASIDE: (i32, RGBColor) = (14, FAINT);
const VALUE: (i32, RGBColor) = (11, FAINT);

// Pixels.
const WIDTH: i32 = 1100;
const MARGIN: i32 = 24;
const LEFT: i32 = 150;
const RIGHT: i32 = 70;
const TOP: i32 = 128;
const BOTTOM: i32 = 48;
const BAR: i32 = 10;
const ROW_GAP: i32 = 7;
const GROUP_GAP: i32 = 10;

/// So many times less than a mark of the scale is near enough for the scale to end there.
const SLIGHTLY: f64 = 1.1;

/// A benchmark's bars.
struct Row<'a> {
    name: &'a str,
    bars: Vec<(Launcher, f64)>,
}

/// Makes sure that the fonts are there.
pub(super) fn require() -> Result<(), Error> {
    packages::require(&FONTS.iter().map(|(_, path)| (*path, FONT_PACKAGE)).collect::<Vec<_>>())
}

fn failed(error: impl Display) -> Error {
    Error::Guest(format!("the picture could not be drawn: {error}"))
}

/// Draws bench.svg and bench.png in `dir`.
pub(super) fn draw(results: &Results, about: &About, dir: &Path) -> Result<(), Error> {
    let rows = rows(results);
    if rows.is_empty() {
        return Err(failed("no benchmark has run natively and in a guest"));
    }
    for (style, path) in FONTS {
        let bytes = at(Path::new(path), std::fs::read(path))?;
        // The library keeps fonts to the end, as does this program.
        register_font(FAMILY, *style, bytes.leak()).map_err(|_| failed(format!("{path} is no font")))?;
    }
    let date = run(std::process::Command::new("date").arg("+%Y-%m-%d"))?;
    let subtitle = format!("{}, {}, guest kernel {}", date.trim(), about.cpu, about.kernel);
    at(dir, std::fs::create_dir_all(dir))?;
    let picture = Picture::new(&rows);
    let (svg, png) = (dir.join("bench.svg"), dir.join("bench.png"));
    let size = |zoom: i32| ((WIDTH * zoom) as u32, (picture.height * zoom) as u32);
    let area = SVGBackend::new(&svg, size(1)).into_drawing_area();
    picture.draw(&Canvas { area, zoom: 1 }, &subtitle).map_err(failed)?;
    // Letters stand on whole pixels, which takes small ones.
    let area = BitMapBackend::new(&png, size(2)).into_drawing_area();
    picture.draw(&Canvas { area, zoom: 2 }, &subtitle).map_err(failed)?;
    eprintln!("{} and {}", svg.display(), png.display());
    Ok(())
}

fn rows(results: &Results) -> Vec<Row<'_>> {
    let bars = |name: &str| -> Vec<(Launcher, f64)> {
        let launchers = COLOURS.iter().map(|(launcher, _)| *launcher);
        launchers.filter_map(|launcher| Some((launcher, results.slowdown(launcher, name)?))).collect()
    };
    let rows = results.names.iter().map(|name| Row { name, bars: bars(name) });
    rows.filter(|row| !row.bars.is_empty()).collect()
}

fn colour(launcher: Launcher) -> RGBColor {
    COLOURS.iter().find(|(l, _)| *l == launcher).map_or(INK, |(_, colour)| *colour)
}

/// The part of a name before the point.
fn group(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}

/// Numbers that the scale may have, from one in a thousand on.
fn marks() -> impl Iterator<Item = f64> {
    (-3..=6).flat_map(|power: i32| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(power)))
}

type Drawn<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

/// What is drawn on, in pixels of the picture times `zoom`.
struct Canvas<DB: DrawingBackend> {
    area: DrawingArea<DB, Shift>,
    zoom: i32,
}

impl<DB: DrawingBackend> Canvas<DB> {
    fn at(&self, (x, y): (i32, i32)) -> (i32, i32) {
        (x * self.zoom, y * self.zoom)
    }

    fn rectangle(&self, from: (i32, i32), to: (i32, i32), colour: RGBColor) -> Drawn<DB> {
        self.area.draw(&Rectangle::new([self.at(from), self.at(to)], colour.filled()))
    }

    fn line(&self, from: (i32, i32), to: (i32, i32), colour: RGBColor) -> Drawn<DB> {
        let style = colour.stroke_width(self.zoom as u32);
        self.area.draw(&PathElement::new([self.at(from), self.at(to)], style))
    }

    /// Text of `size`, one side or the middle of which is at a place.
    fn text(
        &self,
        text: &str,
        (size, colour): (i32, RGBColor),
        side: (HPos, VPos),
        at: (i32, i32),
    ) -> Drawn<DB> {
        let weight = if size == TITLE.0 { FontStyle::Bold } else { FontStyle::Normal };
        let font = (FAMILY, size * self.zoom, weight).into_font();
        let style = TextStyle::from(font).color(&colour).pos(Pos::new(side.0, side.1));
        self.area.draw_text(text, &style, self.at(at))
    }
}

/// Where everything is.
struct Picture<'a> {
    rows: &'a [Row<'a>],
    /// Tops of the rows.
    tops: Vec<i32>,
    height: i32,
    /// The ends of the scale.
    ends: (f64, f64),
}

impl Picture<'_> {
    fn new<'a>(rows: &'a [Row<'a>]) -> Picture<'a> {
        let mut tops = Vec::new();
        let mut y = TOP + GROUP_GAP / 2;
        for (at, row) in rows.iter().enumerate() {
            if at > 0 && group(rows[at - 1].name) != group(row.name) {
                y += GROUP_GAP;
            }
            tops.push(y);
            y += row.bars.len() as i32 * BAR + ROW_GAP;
        }
        let values = || rows.iter().flat_map(|row| row.bars.iter().map(|(_, value)| *value));
        let (least, most) = (values().fold(1.0, f64::min), values().fold(10.0, f64::max));
        let low = marks().filter(|mark| *mark <= least * SLIGHTLY).fold(0.001, f64::max);
        let high = marks().find(|mark| *mark >= most).unwrap_or(most);
        Picture { rows, tops, height: y + GROUP_GAP / 2 + BOTTOM, ends: (low, high) }
    }

    /// Where a slow-down is.
    fn x(&self, value: f64) -> i32 {
        let (low, high) = self.ends;
        let part = (value.max(low) / low).ln() / (high / low).ln();
        LEFT + (part * f64::from(WIDTH - LEFT - RIGHT)).round() as i32
    }

    fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<DB>, subtitle: &str) -> Drawn<DB> {
        canvas.area.fill(&WHITE)?;
        self.title(canvas, subtitle)?;
        self.bands(canvas)?;
        self.scale(canvas)?;
        for (row, top) in self.rows.iter().zip(&self.tops) {
            self.row(canvas, row, *top)?;
        }
        canvas.area.present()
    }

    fn title<DB: DrawingBackend>(&self, canvas: &Canvas<DB>, subtitle: &str) -> Drawn<DB> {
        let left = (HPos::Left, VPos::Center);
        canvas.text("Time of a unit of work, as a multiple of native", TITLE, left, (MARGIN, 32))?;
        canvas.text(subtitle, ASIDE, left, (MARGIN, 60))?;
        let mut x = MARGIN;
        for (launcher, colour) in COLOURS {
            let drawn = |row: &Row| row.bars.iter().any(|(l, _)| l == launcher);
            if self.rows.iter().any(drawn) {
                canvas.rectangle((x, 80), (x + 14, 94), *colour)?;
                canvas.text(launcher.title(), NAME, left, (x + 22, 88))?;
                x += 44 + 7 * launcher.title().len() as i32;
            }
        }
        canvas.text("shorter is better; the scale is logarithmic", ASIDE, left, (x + 8, 88))
    }

    /// A shade behind every other group.
    fn bands<DB: DrawingBackend>(&self, canvas: &Canvas<DB>) -> Drawn<DB> {
        let mut shaded = false;
        let mut from = TOP;
        for (at, row) in self.rows.iter().enumerate() {
            let next = self.rows.get(at + 1);
            if next.is_some_and(|next| group(next.name) == group(row.name)) {
                continue;
            }
            let to =
                self.tops.get(at + 1).map_or(self.height - BOTTOM, |top| top - (GROUP_GAP + ROW_GAP) / 2);
            if shaded {
                canvas.rectangle((0, from), (WIDTH, to), BAND)?;
            }
            (shaded, from) = (!shaded, to);
        }
        Ok(())
    }

    /// Lines at 1, 2, 5, 10 and so on, with numbers above and below.
    fn scale<DB: DrawingBackend>(&self, canvas: &Canvas<DB>) -> Drawn<DB> {
        let bottom = self.height - BOTTOM;
        let (low, high) = self.ends;
        for value in marks().filter(|value| (low..=high).contains(value)) {
            let x = self.x(value);
            canvas.line((x, TOP), (x, bottom), if value == 1.0 { ASIDE.1 } else { GRID })?;
            for (y, side) in [(TOP - 5, VPos::Bottom), (bottom + 7, VPos::Top)] {
                canvas.text(&format!("{value}"), ASIDE, (HPos::Center, side), (x, y))?;
            }
        }
        Ok(())
    }

    fn row<DB: DrawingBackend>(&self, canvas: &Canvas<DB>, row: &Row, top: i32) -> Drawn<DB> {
        let middle = top + row.bars.len() as i32 * BAR / 2;
        canvas.text(row.name, NAME, (HPos::Right, VPos::Center), (LEFT - 12, middle))?;
        let native = self.x(1.0);
        for (at, (launcher, value)) in row.bars.iter().enumerate() {
            let (y, end) = (top + at as i32 * BAR, self.x(*value));
            // A bar of 1 would have no length.
            let (from, to) = (native.min(end), native.max(end).max(native.min(end) + 2));
            canvas.rectangle((from, y), (to, y + BAR - 2), colour(*launcher))?;
            let label = if *value < 9.95 { format!("{value:.1}") } else { format!("{value:.0}") };
            canvas.text(&label, VALUE, (HPos::Left, VPos::Center), (to + 5, y + BAR / 2 - 1))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_goes_from_mark_to_mark() {
        let row = |value| Row { name: "int.list", bars: vec![(Launcher::Ring3, value)] };
        let ends = |values: &[f64]| Picture::new(&values.iter().map(|&v| row(v)).collect::<Vec<_>>()).ends;
        assert_eq!(ends(&[0.99, 735.0]), (1.0, 1000.0));
        assert_eq!(ends(&[0.4, 12.0]), (0.2, 20.0));
        assert_eq!(ends(&[3.0]), (1.0, 10.0));
        let rows = [row(0.99), row(1000.0)];
        let picture = Picture::new(&rows);
        assert_eq!((picture.x(0.99), picture.x(1000.0)), (LEFT, WIDTH - RIGHT));
    }
}
