// Colour maps that colour-blind people can read: cividis (Nuñez, Anderton and Renslow 2018) for
// amounts, and blue to orange for differences.

const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const DIVERGING = ["#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b"];

export const amounts = table(CIVIDIS);
export const differences = table(DIVERGING);
export const NOTHING = [128, 128, 128, 60];

// 256 colours between the given ones, as [r, g, b].
function table(anchors) {
  const rgb = anchors.map((each) => [1, 3, 5].map((at) => parseInt(each.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, number) => {
    const place = (number / 255) * (rgb.length - 1);
    const low = Math.min(Math.floor(place), rgb.length - 2);
    return rgb[low].map((each, channel) => Math.round(each + (rgb[low + 1][channel] - each) * (place - low)));
  });
}

// A function from a value to a place from 0 to 255; null for NaN.
export function scaled([low, high], isSquareRoot = false) {
  const width = high - low || 1;
  return (value) => {
    if (Number.isNaN(value)) return null;
    const share = Math.min(1, Math.max(0, (value - low) / width));
    return Math.round(255 * (isSquareRoot ? Math.sqrt(share) : share));
  };
}

export function css(colour) {
  return `rgb(${colour.join(" ")})`;
}

// Black or white, whichever reads better on a colour.
export function inkOn([red, green, blue]) {
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000" : "#fff";
}
