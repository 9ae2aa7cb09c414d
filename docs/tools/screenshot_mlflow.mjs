// Photograph the comparison page of the MLflow UI: the sample images of its runs side by side, at the last step.
// Usage: node screenshot_mlflow.mjs ADDRESS PICTURE.png [children]   (see CONTRIBUTING.md, "Looking at the MLflow UI")
// children: of the first run in the list, in its place.
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { chromium } from "playwright-core";

const [address, picture, children] = process.argv.slice(2);
const offline = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"];
const browser = await chromium.launchPersistentContext(mkdtempSync(`${tmpdir()}/chromium-`), {
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", ...offline],
  viewport: { width: 1600, height: children ? 2000 : 1700 }, // cards out of sight are not drawn
});
const page = await browser.newPage();
await page.goto(address);
await page.locator('[data-component-id="mlflow.assistant.chat_panel.close"]').click();
await page.getByLabel("Toggle sidebar").click();
if (children) {
  await page.locator('[data-component-id*="runnamecellrenderer"]').first().click(); // the + before its name
  await page.locator(".ag-row label", { hasText: "Hide run" }).first().click();
  await page.waitForTimeout(4000);
}
const images = page.locator("img[src*='get-artifact']");
await images.first().waitFor({ timeout: 60_000 });

// a card as narrow as the page makes it shows one run above the other: drag the first wider and higher, the others follow
const cards = page.locator(".react-resizable", { hasText: "samples/" });
const corner = await cards.first().getByTestId("draggable-card-resize-handle").boundingBox();
await page.mouse.move(corner.x + 8, corner.y + 8);
await page.mouse.down();
await page.mouse.move(corner.x + (children ? 900 : 300), corner.y + (children ? 250 : 88), { steps: 10 });
await page.mouse.up();
await page.waitForTimeout(2000);

// the step sliders stand at 0: click their right ends
for (const card of await cards.all()) {
  const track = await card.locator(".TRACK").boundingBox();
  await page.mouse.click(track.x + track.width - 1, track.y + track.height / 2);
}
await page.waitForTimeout(5000); // pictures and curves come after their cards
console.log(`${await images.count()} sample images on the page`);
await page.screenshot({ path: picture });
await browser.close();
