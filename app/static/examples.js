// Posts to try. The first speaks the language of the demo's made-up world, so that its tiny model understands it.

export const EXAMPLES = [
  {
    name: "Broken bike",
    about: "In the words of the demo’s made-up world",
    subreddit: "legaladvice",
    title: "my neighbor and the bike",
    body:
      "anyway here we are. i got into a fight with my neighbor. the bike got broken. it happened on saturday. " +
      "my mom lives in austin. fixing it took 90 dollars. now i feel guilty. should i forgive? " +
      "edit: on sunday? no, that saturday.",
  },
  {
    name: "Other cat",
    subreddit: "cats",
    title: "My cat comes home smelling of someone else's perfume",
    body:
      "Biscuit is four, ginger, and has always been an indoor-outdoor cat. For the last month he has gone out after " +
      "breakfast and come back at six on the dot, smelling of perfume and not the least bit hungry. The vet says he " +
      "has put on almost a kilo.\n\n" +
      "Yesterday I tied a note to his collar asking whether anybody was feeding him. He came home with a reply: " +
      "\"We thought he was a stray! We call him Gerald. He has his own chair.\" It was signed by the couple at number " +
      "12, whom I have never met.\n\n" +
      "I am glad that he is loved, but I worry about his weight, and honestly I am a little hurt. How do I ask them " +
      "to stop feeding my cat without falling out with people I would rather like to know?",
  },
  {
    name: "Marathon",
    subreddit: "running",
    title: "Six weeks out and my longest run is 14 km. Switch to the half?",
    body:
      "I signed up for my first marathon in January with a colleague. Training went well until May, when a cold that " +
      "would not leave cost me three weeks. Since then I have run three times a week, but every time I go beyond 12 km " +
      "my left knee starts to complain. My longest run so far is 14 km, at about 6:20 a kilometre.\n\n" +
      "The organisers let you change to the half marathon without a fee until Sunday. My colleague says I should stay " +
      "with the full distance and walk when I must. My partner says that finishing healthy is the whole point.\n\n" +
      "I don't care about the time. I do care about not being injured, since we go hiking the week after. Has anybody " +
      "gone from 14 to 42 km in six weeks and not regretted it?",
  },
];
